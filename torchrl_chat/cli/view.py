"""``torchrl-chat view``: rollout files in the browser, on this machine only."""

from __future__ import annotations

import argparse
from typing import Any

from torchrl_chat.cli.play import add_page_arguments, show

DESCRIPTION = """\
Look at rollout files: filter, sort, read conversations and tokens, compare the answers to one question. The page opens in
the browser, served on this machine only, and Ctrl-C ends it.

  torchrl-chat view runs/rollouts.jsonl
  torchrl-chat view runs/                # every *.jsonl in the folder, the newest first"""


def add_parser(commands: Any) -> None:
    """Add ``view`` to the commands."""
    parser = commands.add_parser(
        "view",
        help="look at rollout files in the browser",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="FILE|FOLDER", help="a rollout file, or a folder of them")
    add_page_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the viewer until Ctrl-C; the result is the exit code.

    Raises:
        ValueError: there is no such file or folder.
    """
    from torchrl_chat.viewer import viewer_app

    app = viewer_app(arguments.path)

    def server_of(app: Any) -> Any:
        import uvicorn

        return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))

    show(server_of, app, arguments)
    return 0
