"""The parts of the bench that run inside the agents' processes."""

import struct
import time

POLLS_PER_LOOK = 16
WAKEUP_PAUSE_S = 0.02
RECEIVER_SLEEP_S = 0.00002


def time_transfers(worker, operation, near, far, peer, least, most, seconds):
    """Posts one request again and again; the seconds that each took until DONE."""
    handle = worker.prepare(operation, near, far, peer)
    agent, request = worker.agent, worker.handles[handle]
    samples = []
    finish = 0.0
    # The first goes uncounted: it warms connections, caches and page tables.
    for turn in range(most + 1):
        start = time.perf_counter()
        state = agent.transfer(request)
        while state == "PROC":
            state = agent.check_xfer_state(request)
        end = time.perf_counter()
        if state != "DONE":
            raise RuntimeError(f"{operation}: {state}")
        if turn == 0:
            finish = end + seconds
            continue
        samples.append(end - start)
        if len(samples) >= least and end > finish:
            break
    worker.release(handle)
    return samples


def stand_by(worker):
    """Until the next command: drives the agent if it has no progress thread, else sleeps."""
    if not worker.drive:
        worker.pipe.poll(None)
        return
    while not worker.pipe.poll(0):
        for _ in range(POLLS_PER_LOOK):
            worker.agent.get_new_notifs()


def send_times(worker, peer, count):
    """Sends the time of sending, with a pause between that lets the receiver fall asleep."""
    for _ in range(count):
        time.sleep(WAKEUP_PAUSE_S)
        worker.send(peer, struct.pack("<d", time.monotonic()))


def receive_times(worker, count, seconds):
    """How long each message took from its sending to the program that looks for it every 20 us."""
    delays = []
    deadline = time.monotonic() + seconds
    while len(delays) < count and time.monotonic() < deadline:
        for messages in worker.agent.get_new_notifs().values():
            now = time.monotonic()
            delays.extend(now - struct.unpack("<d", message)[0] for message in messages)
        time.sleep(RECEIVER_SLEEP_S)
    return delays
