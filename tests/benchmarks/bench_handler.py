"""What a request without a key costs: time against an empty aiohttp handler, and memory.

    python -m tests.benchmarks.bench_handler

Both handlers are in one server and get the same forged requests in turn, so that whatever else the machine does falls
on both. Noise only ever adds time: the fastest round of each counts, and the quartiles of the pairs are shown. Exits with 1 above the limits.
"""

import asyncio
import gc
import logging
import os
import socket
import statistics
import sys
import threading
import time
import tracemalloc

from aiohttp import web

from safedefer.web.handler import routes
from tests.adversarial.forge import URL, make_app, mint

LIMIT = 1.5
MEMORY_LIMIT = 256 * 1024
ROUNDS, REQUESTS = 60, 250


async def empty(request):
    await request.read()
    return web.Response(status=403, body=b"refused\n", headers={"Safedefer-Outcome": "refused"})


class Server:
    """The server, in a thread of its own: its CPU time is nobody else's."""

    def __init__(self, app):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner, self.address = self.call(self.start(app))

    async def start(self, app):
        web_app = web.Application()
        web_app.add_routes([web.post("/empty", empty), *routes(app)])
        runner = web.AppRunner(web_app, auto_decompress=False, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][:2]

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def seconds(self):
        return time.thread_time()

    def stop(self):
        self.call(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def ask(server, connection, data, count):
    """Send ``count`` requests one after the other; seconds of the server's CPU time."""
    began = server.call(server.seconds())
    for _ in range(count):
        connection.sendall(data)
        answer = b""
        while not answer.endswith(b"refused\n"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 403 "), answer
    return server.call(server.seconds()) - began


def request(path, token):
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/jose\r\nContent-Length: {len(token)}\r\n\r\n".encode()
        + token
    )


def main():
    logging.disable(logging.CRITICAL)  # an access log would cost the empty handler as much
    app = make_app(observer=lambda event: None)
    server = Server(app)
    connection = socket.create_connection(server.address)

    forged = mint(args=["x" * 200])[:-4] + b"AAAA"
    ours, theirs = request(URL, forged), request("/empty", forged)
    for data in (ours, theirs):
        ask(server, connection, data, 300)
    ratios, costs = [], []
    for number in range(ROUNDS):
        pair = {}
        for data in (ours, theirs) if number % 2 else (theirs, ours):
            pair[data] = ask(server, connection, data, REQUESTS)
        ratios.append(pair[ours] / pair[theirs])
        costs.append((pair[ours] / REQUESTS * 1e6, pair[theirs] / REQUESTS * 1e6))
    mine, empties = (min(column) for column in zip(*costs, strict=True))
    ratio = mine / empties

    tracemalloc.start()
    ask(server, connection, ours, 500)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    ask(server, connection, ours, 5000)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    connection.close()
    server.stop()
    app.close()

    print(f"forged request: {mine:.0f} us; empty handler: {empties:.0f} us (CPU time of the server)")
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"ratio of the fastest of {ROUNDS} rounds: {ratio:.3f}; limit {LIMIT} (pairs: {low:.3f}, {median:.3f}, {high:.3f})"
    )
    print(f"memory kept after 5,000 more forged requests: {after - before} bytes; limit {MEMORY_LIMIT}")
    return ratio <= LIMIT and after - before <= MEMORY_LIMIT


if __name__ == "__main__":
    os.environ.pop("PYTHONASYNCIODEBUG", None)
    sys.exit(0 if main() else 1)
