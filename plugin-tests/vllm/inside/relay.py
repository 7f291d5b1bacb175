"""Carries connections to ports of 127.0.0.1 on to Unix sockets: relay.py <port> <socket> [<port> <socket> ...]"""

import asyncio
import sys
from functools import partial


async def pour(source, sink):
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass  # one side has gone: so does the other
    finally:
        sink.close()


async def carry(path, reader, writer):
    far_reader, far_writer = await asyncio.open_unix_connection(path)
    await asyncio.gather(pour(reader, far_writer), pour(far_reader, writer))


async def main(pairs):
    servers = [await asyncio.start_server(partial(carry, path), "127.0.0.1", int(port)) for port, path in pairs]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(list(zip(sys.argv[1::2], sys.argv[2::2]))))
