"""``python -m tests.postgres``: a server to try things on, until Ctrl-C."""

import signal

from tests.postgres.server import Server

if __name__ == "__main__":
    server = Server(durable=True).start()
    print(server.dsn(), flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        server.close()
