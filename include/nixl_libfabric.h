#ifndef NIXL_LIBFABRIC_H
#define NIXL_LIBFABRIC_H

// Written by cbindgen from src/abi/types.rs; do not edit.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// An engine, behind its panic guard.
typedef struct NlfEngineHandle NlfEngineHandle;

// One share of a memory region's metadata.
typedef struct NlfMetadataHandle NlfMetadataHandle;

// One share of a transfer request.
typedef struct NlfRequestHandle NlfRequestHandle;

// Bytes that the caller lends for the length of one call.
typedef struct NlfBytes {
  // First byte; may be null when `len` is 0.
  const uint8_t *data;
  // Number of bytes.
  size_t len;
} NlfBytes;

// A key and its value.
typedef struct NlfPair {
  // The key.
  struct NlfBytes key;
  // Its value.
  struct NlfBytes value;
} NlfPair;

// Takes pairs of bytes, one by one, by copy. False: there was no memory for them.
typedef struct NlfPairSink {
  // Passed back to `put`.
  void *context;
  // Takes one pair; must not unwind.
  bool (*put)(void *context, struct NlfPair pair);
} NlfPairSink;

// Takes memory kinds (`nixl_mem_t`), one by one. False: there was no memory for it.
typedef struct NlfMemSink {
  // Passed back to `put`.
  void *context;
  // Takes one kind; must not unwind.
  bool (*put)(void *context, int32_t mem);
} NlfMemSink;

// What NIXL passes when it creates a backend.
typedef struct NlfCreateParams {
  // Name of the agent that the engine serves.
  struct NlfBytes local_agent;
  // The user's options.
  const struct NlfPair *options;
  // Number of options.
  size_t options_len;
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

// Takes bytes, by copy. False: there was no memory for them.
typedef struct NlfBytesSink {
  // Passed back to `put`.
  void *context;
  // Takes the bytes; must not unwind.
  bool (*put)(void *context, struct NlfBytes bytes);
} NlfBytesSink;

// The object that NIXL holds for a memory region: its base `nixlBackendMD`, then ours.
typedef struct NlfMetadataObject {
  // The C++ virtual table.
  const void *vtable;
  // Set for a region of this agent.
  bool is_private;
  // The region's metadata.
  const struct NlfMetadataHandle *handle;
} NlfMetadataObject;

// One element of a transfer list, laid out as NIXL's `nixlMetaDesc`.
typedef struct NlfMetaDesc {
  // The range.
  struct NlfBasicDesc range;
  // The region that the range lies in.
  const struct NlfMetadataObject *metadata;
} NlfMetaDesc;

// A transfer list.
typedef struct NlfMetaDescs {
  // First element; may be null when `len` is 0.
  const struct NlfMetaDesc *data;
  // Number of elements.
  size_t len;
} NlfMetaDescs;

// One element of a registration list, laid out as NIXL's `nixlBlobDesc`.
typedef struct NlfBlobDesc {
  // The range.
  struct NlfBasicDesc range;
  // A C++ string, which the Rust side leaves alone.
  uint64_t meta_info[4];
} NlfBlobDesc;

// Takes the answers to a memory query: for each range `entry`, then, when it is present, `attribute` for each attribute.
// False: there was no memory for it.
typedef struct NlfQuerySink {
  // Passed back to both functions.
  void *context;
  // Begins the next range's answer; must not unwind.
  bool (*entry)(void *context, bool present);
  // Adds an attribute to the answer begun last; must not unwind.
  bool (*attribute)(void *context, struct NlfPair attribute);
} NlfQuerySink;

// Every call that the C++ side makes into Rust.
//
// Rust hands the table over instead of exporting the functions, so that the plugin's only dynamic symbols are the two that
// NIXL looks for. No function unwinds. Those that return a number return a `nixl_status_t`, and have written a line to the log
// when it is an error.
//
// Rules for the caller:
// - Pointers are valid for the call, except for handles, which this table gave out and which were not given back yet.
// - `destroy` is called when no other call on the engine is running.
// - A handle that is released is gone, whatever the status.
typedef struct NlfEngineOps {
  // Name of the plugin, from the name of its file.
  const char *(*plugin_name)(void);
  // Version of the plugin.
  const char *(*plugin_version)(void);
  // Every option with its default.
  void (*plugin_options)(struct NlfPairSink sink);
  // Memory kinds that an engine made on this machine would support.
  void (*plugin_mems)(struct NlfMemSink sink);
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
  // Ends a registration; takes the handle.
  int32_t (*deregister_mem)(const struct NlfEngineHandle *engine, struct NlfMetadataHandle *metadata);
  // Prepares what `load_remote_md` needs at another agent.
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
                            struct NlfBytes public_data,
                            struct NlfBytes agent,
                            struct NlfMetadataHandle **out);
  // Forgets loaded metadata; takes the handle.
  int32_t (*unload_md)(const struct NlfEngineHandle *engine, struct NlfMetadataHandle *metadata);
  // What other agents need to reach this one.
  int32_t (*conn_info)(const struct NlfEngineHandle *engine, struct NlfBytesSink sink);
  // Takes what another agent's `conn_info` said.
  int32_t (*load_remote_conn_info)(const struct NlfEngineHandle *engine, struct NlfBytes agent, struct NlfBytes info);
  // Connects to an agent.
  int32_t (*connect)(const struct NlfEngineHandle *engine, struct NlfBytes agent);
  // Ends the connection to an agent.
  int32_t (*disconnect)(const struct NlfEngineHandle *engine, struct NlfBytes agent);
  // Prepares a transfer; the lists are not kept.
  int32_t (*prep_xfer)(const struct NlfEngineHandle *engine,
                       int32_t op,
                       struct NlfMetaDescs local,
                       struct NlfMetaDescs remote,
                       struct NlfBytes agent,
                       struct NlfRequestHandle **out);
  // Starts a transfer; `notification` is null for none.
  int32_t (*post_xfer)(const struct NlfEngineHandle *engine,
                       const struct NlfRequestHandle *request,
                       const struct NlfBytes *notification);
  // How a transfer stands.
  int32_t (*check_xfer)(const struct NlfEngineHandle *engine, const struct NlfRequestHandle *request);
  // Gives a request up, in flight or not; takes the handle.
  int32_t (*release_request)(const struct NlfEngineHandle *engine, struct NlfRequestHandle *request);
  // Expected duration of a request and its uncertainty, in microseconds.
  int32_t (*estimate_cost)(const struct NlfEngineHandle *engine,
                           const struct NlfRequestHandle *request,
                           int64_t *duration_us,
                           int64_t *margin_us);
  // Takes the notifications that have arrived: pairs of sender and message.
  int32_t (*take_notifications)(const struct NlfEngineHandle *engine, struct NlfPairSink sink);
  // Sends a notification that belongs to no transfer.
  int32_t (*send_notification)(const struct NlfEngineHandle *engine, struct NlfBytes agent, struct NlfBytes message);
  // Says what is known of ranges of memory.
  int32_t (*query_mem)(const struct NlfEngineHandle *engine,
                       int32_t mem,
                       const struct NlfBlobDesc *descs,
                       size_t descs_len,
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
