"""The parts of the bench that run inside the agents' processes."""

import ctypes
import struct
import time

POLLS_PER_LOOK = 16
WAKEUP_PAUSE_S = 0.02
NOTIFIED_PAUSE_S = 0.001
# How long a program sleeps between two looks where processor time is measured: what it polls in vain must not be counted.
UNHURRIED_S = 0.0001
POSTS_MIN = 3
# Long enough for a handshake, before a transfer that is to find its peer connected.
CONNECT_S = 0.5
# Ranges that a call of process_vm takes for each side.
IOV_MAX = 1024


def settle(agent, request, state, pause=None):
    """Polls until the transfer is over; raises unless it is DONE."""
    while state == "PROC":
        if pause:
            time.sleep(pause)
        state = agent.check_xfer_state(request)
    if state != "DONE":
        raise RuntimeError(f"the transfer ended as {state}")


def time_transfers(worker, operation, near, far, peer, least, most, seconds):
    """Posts one request again and again; the seconds that each took until DONE."""
    handle = worker.prepare(operation, near, far, peer)
    agent, request = worker.agent, worker.handles[handle]
    samples = sample(lambda: settle(agent, request, agent.transfer(request)), least, most, seconds)
    worker.release(handle)
    return samples


def sample(work, least, most, seconds):
    """The seconds of each run of `work`: for so long, but of these numbers of runs."""
    samples = []
    finish = 0.0
    # The first goes uncounted: it warms connections, caches and page tables.
    for turn in range(most + 1):
        start = time.perf_counter()
        work()
        end = time.perf_counter()
        if turn == 0:
            finish = end + seconds
            continue
        samples.append(end - start)
        if len(samples) >= least and end > finish:
            break
    return samples


def stand_by(worker, pause=None):
    """Until the next command: drives the agent if it has no progress thread, else sleeps. The processor seconds that it took."""
    start = time.process_time()
    if not worker.drive:
        worker.pipe.poll(None)
    while not worker.pipe.poll(0):
        if pause:
            time.sleep(pause)
        for _ in range(1 if pause else POLLS_PER_LOOK):
            worker.agent.get_new_notifs()
    return time.process_time() - start


def post_unhurried(worker, handle, seconds):
    """Posts a prepared request again and again, with a program that looks now and then: number of posts, processor seconds."""
    agent, request = worker.agent, worker.handles[handle]
    posts, start, finish = 0, time.process_time(), time.monotonic() + seconds
    while posts < POSTS_MIN or time.monotonic() < finish:
        settle(agent, request, agent.transfer(request), UNHURRIED_S)
        posts += 1
    return posts, time.process_time() - start


def now():
    """The time as a message: the clock is one for all processes of a machine."""
    return struct.pack("<d", time.monotonic())


def time_notified(worker, near, far, peer, count):
    """WRITEs whose notification is the time of their post, one at a time; the seconds that each took until DONE."""
    handle = worker.prepare("WRITE", near, far, peer)
    agent, request = worker.agent, worker.handles[handle]
    samples = []
    for _ in range(count):
        start = time.monotonic()
        settle(agent, request, agent.transfer(request, now()))
        end = time.monotonic()
        samples.append(end - start)
        # DONE may come before the notification has left.
        while (left := end + NOTIFIED_PAUSE_S - time.monotonic()) > 0:
            if worker.drive:
                agent.get_new_notifs()
            else:
                time.sleep(left)
    worker.release(handle)
    return samples


def send_times(worker, peer, count):
    """Sends the time of sending, with a pause between that lets the receiver fall asleep."""
    for _ in range(count):
        time.sleep(WAKEUP_PAUSE_S)
        worker.send(peer, now())


def receive_times(worker, count, pause, seconds):
    """How long each message took from its sending to the program that looks for it, every `pause` seconds or all the time."""
    delays = []
    deadline = time.monotonic() + seconds
    while len(delays) < count:
        for messages in worker.agent.get_new_notifs().values():
            end = time.monotonic()
            delays.extend(end - struct.unpack("<d", message)[0] for message in messages)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(delays)} of {count} notifications came in {seconds} s")
        if pause:
            time.sleep(pause)
    return delays


def time_first(worker, metadata, peer, near, far, connects):
    """The first transfer to a peer and the one after it: seconds to load the peer's metadata, to connect, to post until DONE; all
    of it; and of the second transfer."""
    agent = worker.agent
    start = time.perf_counter()
    worker.add_remote(metadata)
    loaded = time.perf_counter()
    if connects:
        agent.make_connection(peer)
    connected = time.perf_counter()
    if connects:
        # The peers get to know each other: that is not the transfer's.
        time.sleep(CONNECT_S)
    posted = time.perf_counter()
    handle = worker.prepare("WRITE", near, far, peer)
    request = worker.handles[handle]
    settle(agent, request, agent.transfer(request))
    done = time.perf_counter()
    settle(agent, request, agent.transfer(request))
    again = time.perf_counter()
    worker.release(handle)
    return loaded - start, connected - loaded, done - posted, connected - start + done - posted, again - done


class Range(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def time_bare_copies(worker, operation, near, far, pid, least, most, seconds):
    """The same copies by process_vm_writev(2) and process_vm_readv(2) alone, IOV_MAX ranges in each call; the seconds of each."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_writev if operation == "WRITE" else libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    calls = []
    for start in range(0, len(near), IOV_MAX):
        some = [(Range * len(part))(*part) for part in (near[start : start + IOV_MAX], far[start : start + IOV_MAX])]
        count = ctypes.c_ulong(len(some[0]))
        calls.append((some[0], count, some[1], count, sum(size for _, size in near[start : start + IOV_MAX])))
    pid, flags = ctypes.c_int(pid), ctypes.c_ulong(0)

    def copy():
        for here, here_count, there, there_count, size in calls:
            if call(pid, here, here_count, there, there_count, flags) != size:
                raise RuntimeError(f"process_vm: {ctypes.get_errno()}")

    return sample(copy, least, most, seconds)
