"""Serves the runs of a folder to the browser tests, and tells what the process holds.

`python -m tests.server.serving RUNS PORT`
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import uvicorn
from nicegui import Client

from tutelage.server.app import Process, build
from tutelage.server.page import mount

POOLS = ("feed", "look", "asyncio", "AnyIO")  # threads of bounded number, made when first there is work for them


def main(runs: Path, port: int) -> None:
    app = build(runs)

    @app.get("/-/held")
    async def held() -> dict[str, int]:
        pages = [client for client in Client.instances.values() if client.has_socket_connection]
        counts = {"pages": len(pages), "lives": len(house.lives), "present": len(house.present)}
        return (
            counts
            | {"viewers": sum(feed.viewers for feed in house.desk.feeds._feeds.values())}
            | {"threads": sum(not thread.name.startswith(POOLS) for thread in threading.enumerate())}
        )

    house = mount(app)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=2)
    Process(config, house.desk).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
