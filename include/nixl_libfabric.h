#ifndef NIXL_LIBFABRIC_H
#define NIXL_LIBFABRIC_H

// Written by cbindgen from src/abi/types.rs; do not edit.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Virtual functions of an engine in `nixl_backend_abi.h`.
#define NlfFUNCTIONS 27

// Most virtual functions that an engine can have.
#define NlfSLOTS_MAX 64

// An engine, behind its panic guard.
typedef struct NlfEngineHandle NlfEngineHandle;

// One share of a memory region's metadata.
typedef struct NlfMetadataHandle NlfMetadataHandle;

// One share of a transfer request.
typedef struct NlfRequestHandle NlfRequestHandle;

// Elements that the caller lends for the length of one call.
typedef struct NlfSlice_u8 {
  // First element; may be null when `len` is 0.
  const uint8_t *data;
  // Number of elements.
  size_t len;
} NlfSlice_u8;

// Bytes of any kind, also those of text.
typedef struct NlfSlice_u8 NlfBytes;

// A key and its value, or a sender and its message.
typedef struct NlfPair {
  // The key.
  NlfBytes key;
  // Its value.
  NlfBytes value;
} NlfPair;

// Takes pairs, one by one, by copy.
typedef struct NlfPairSink {
  // Passed back to `put`.
  void *context;
  // Takes one pair. False: there was no memory for it. Must not unwind.
  bool (*put)(void *context, struct NlfPair pair);
} NlfPairSink;

// Takes memory kinds (`nixl_mem_t`), one by one.
typedef struct NlfMemSink {
  // Passed back to `put`.
  void *context;
  // Takes one kind. False: there was no memory for it. Must not unwind.
  bool (*put)(void *context, int32_t mem);
} NlfMemSink;

// What stands in each slot of an engine's virtual table.
typedef struct NlfEngineLayout {
  // Number of slots; 0: those of `nixl_backend_abi.h`.
  size_t len;
  // For each slot the place of our function in `nixl_backend_abi.h`; -1: a function that returns false; -2: one that returns
  // "not supported"; -3: one that returns nothing.
  int8_t slots[NlfSLOTS_MAX];
} NlfEngineLayout;

// Elements that the caller lends for the length of one call.
typedef struct NlfSlice_Pair {
  // First element; may be null when `len` is 0.
  const struct NlfPair *data;
  // Number of elements.
  size_t len;
} NlfSlice_Pair;

// What NIXL passes when it creates a backend.
typedef struct NlfCreateParams {
  // Name of the agent that the engine serves.
  NlfBytes local_agent;
  // The user's options.
  struct NlfSlice_Pair options;
  // Whether NIXL asked for a progress thread.
  bool progress_thread;
  // Longest sleep of the progress thread between two looks, in microseconds.
  uint64_t progress_delay_us;
} NlfCreateParams;

// A range of memory, laid out as NIXL's `nixlBasicDesc`.
typedef struct NlfBasicDesc {
  // First byte.
  uint64_t addr;
  // Length in bytes.
  uint64_t len;
  // Device number.
  uint64_t dev_id;
} NlfBasicDesc;

// Takes bytes, by copy.
typedef struct NlfBytesSink {
  // Passed back to `put`.
  void *context;
  // Takes the bytes. False: there was no memory for them. Must not unwind.
  bool (*put)(void *context, NlfBytes bytes);
} NlfBytesSink;

// The object that NIXL holds for a memory region: its base `nixlBackendMD`, then ours.
typedef struct NlfMetadataObject {
  // The C++ virtual table.
  const void *vtable;
  // Set for a region of this agent.
  bool is_private;
  // The region's metadata.
  struct NlfMetadataHandle *handle;
} NlfMetadataObject;

// One element of a transfer list, laid out as NIXL's `nixlMetaDesc`.
typedef struct NlfMetaDesc {
  // The range.
  struct NlfBasicDesc range;
  // The region that the range lies in.
  const struct NlfMetadataObject *metadata;
} NlfMetaDesc;

// Elements that the caller lends for the length of one call.
typedef struct NlfSlice_MetaDesc {
  // First element; may be null when `len` is 0.
  const struct NlfMetaDesc *data;
  // Number of elements.
  size_t len;
} NlfSlice_MetaDesc;

// One element of a registration list, laid out as NIXL's `nixlBlobDesc`.
typedef struct NlfBlobDesc {
  // The range.
  struct NlfBasicDesc range;
  // A C++ string, which the Rust side leaves alone.
  uint64_t meta_info[4];
} NlfBlobDesc;

// Elements that the caller lends for the length of one call.
typedef struct NlfSlice_BlobDesc {
  // First element; may be null when `len` is 0.
  const struct NlfBlobDesc *data;
  // Number of elements.
  size_t len;
} NlfSlice_BlobDesc;

// Takes the answers to a memory query, one by one: whether the range is known, then its attributes.
typedef struct NlfQuerySink {
  // Passed back to `begin`.
  void *context;
  // Begins the next range's answer. False: there was no memory for it. Must not unwind.
  bool (*begin)(void *context, bool known);
  // Takes the attributes of the answer begun last.
  struct NlfPairSink attributes;
} NlfQuerySink;

// Every call that the C++ side makes into Rust.
//
// Rust hands the table over instead of exporting the functions, so that the plugin's only dynamic symbols are the two that
// NIXL looks for. No function unwinds. Those that return a number return a `nixl_status_t`, and have written a line to the log
// when it is an error.
//
// Rules for the C++ side, which NIXL's core keeps where the shim cannot:
// - What a call gets is valid, and unchanged by others, until it returns.
// - Handles come from this table. A call that takes one by a pointer to non-const ends it, whatever the status.
// - `destroy` is called when no other call on the engine is running, and is the last.
// - Memory that was registered stays allocated until it was deregistered, and devices may access it until then.
typedef struct NlfEngineOps {
  // Name of the plugin, from the name of its file.
  const char *(*plugin_name)(void);
  // Version of the plugin.
  const char *(*plugin_version)(void);
  // Every option with its default.
  void (*plugin_options)(struct NlfPairSink sink);
  // Memory kinds that an engine made on this machine would support.
  void (*plugin_mems)(struct NlfMemSink sink);
  // Says how the core that calls from `core` wants an engine; false: it must not get one, and the log says why.
  bool (*layout)(const void *core, const void *init, struct NlfEngineLayout *out);
  // Makes an engine; null is failure, and the log says why.
  struct NlfEngineHandle *(*create)(const struct NlfCreateParams *params);
  // Ends an engine.
  void (*destroy)(struct NlfEngineHandle *engine);
  // Memory kinds that the engine supports.
  void (*supported_mems)(const struct NlfEngineHandle *engine, struct NlfMemSink sink);
  // Registers memory.
  int32_t (*register_mem)(const struct NlfEngineHandle *engine,
                          struct NlfBasicDesc range,
                          int32_t mem,
                          struct NlfMetadataHandle **out);
  // Ends a registration.
  int32_t (*deregister_mem)(const struct NlfEngineHandle *engine, struct NlfMetadataHandle *metadata);
  // Says what `load_remote_md` needs at another agent.
  int32_t (*public_data)(const struct NlfEngineHandle *engine,
                         const struct NlfMetadataHandle *metadata,
                         struct NlfBytesSink sink);
  // Metadata with which the agent can be its own target.
  int32_t (*load_local_md)(const struct NlfEngineHandle *engine,
                           const struct NlfMetadataHandle *metadata,
                           struct NlfMetadataHandle **out);
  // Metadata of a region of another agent.
  int32_t (*load_remote_md)(const struct NlfEngineHandle *engine,
                            struct NlfBasicDesc range,
                            int32_t mem,
                            NlfBytes public_data,
                            NlfBytes agent,
                            struct NlfMetadataHandle **out);
  // Forgets loaded metadata.
  int32_t (*unload_md)(const struct NlfEngineHandle *engine, struct NlfMetadataHandle *metadata);
  // Says what other agents need to reach this one.
  int32_t (*conn_info)(const struct NlfEngineHandle *engine, struct NlfBytesSink sink);
  // Takes what another agent's `conn_info` said.
  int32_t (*load_remote_conn_info)(const struct NlfEngineHandle *engine, NlfBytes agent, NlfBytes info);
  // Connects to an agent.
  int32_t (*connect)(const struct NlfEngineHandle *engine, NlfBytes agent);
  // Ends the connection to an agent.
  int32_t (*disconnect)(const struct NlfEngineHandle *engine, NlfBytes agent);
  // Prepares a transfer; the lists are not kept.
  int32_t (*prep_xfer)(const struct NlfEngineHandle *engine,
                       int32_t op,
                       struct NlfSlice_MetaDesc local,
                       struct NlfSlice_MetaDesc remote,
                       NlfBytes agent,
                       struct NlfRequestHandle **out);
  // Starts a transfer; `notification` is null for none.
  int32_t (*post_xfer)(const struct NlfEngineHandle *engine,
                       const struct NlfRequestHandle *request,
                       const NlfBytes *notification);
  // Says how a transfer stands.
  int32_t (*check_xfer)(const struct NlfEngineHandle *engine, const struct NlfRequestHandle *request);
  // Gives a request up, in flight or not.
  int32_t (*release_request)(const struct NlfEngineHandle *engine, struct NlfRequestHandle *request);
  // Expected duration of a request and its uncertainty, in microseconds.
  int32_t (*estimate_cost)(const struct NlfEngineHandle *engine,
                           const struct NlfRequestHandle *request,
                           int64_t *duration_us,
                           int64_t *margin_us);
  // Takes the notifications that have arrived: sender and message.
  int32_t (*take_notifications)(const struct NlfEngineHandle *engine, struct NlfPairSink sink);
  // Sends a notification that belongs to no transfer.
  int32_t (*send_notification)(const struct NlfEngineHandle *engine, NlfBytes agent, NlfBytes message);
  // Says what is known of ranges of memory.
  int32_t (*query_mem)(const struct NlfEngineHandle *engine,
                       int32_t mem,
                       struct NlfSlice_BlobDesc descs,
                       struct NlfQuerySink sink);
} NlfEngineOps;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The C++ side: keeps the table, which must live as long as the process, and returns NIXL's plugin structure
// (`nixlBackendPlugin`), which does.
extern const void *nlf_shim_plugin(const struct NlfEngineOps *ops);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NIXL_LIBFABRIC_H */
