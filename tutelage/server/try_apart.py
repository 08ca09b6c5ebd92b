"""A try that an agent asked for, in a process of its own: `python -m tutelage.server.try_apart FOLDER ID`.

The stage is paused while the twins run, so whoever asked may go, or be killed: the stage goes on when the try is over.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tutelage import trying


def main(folder: Path, id: str) -> None:
    """Run it, keep its result, change nothing."""
    tried = trying.run_try(trying.load_try(folder, id))
    try:
        trying.settle(tried, adopt=False)
    except BaseException:
        trying.release(tried)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
