"""Which model the examples run: the one named on the command line, else the demo model."""

import sys

from mini_infer.demo_model import demo_model_available, demo_model_path


def model_from_command_line() -> str:
    """The first command line argument (a Hugging Face name or a folder), or the demo model's folder."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    if not demo_model_available():
        sys.exit(
            f"no model: run `mini-infer download-demo` first (about 100 MB), or give one: {sys.argv[0]} NAME_OR_FOLDER"
        )
    return str(demo_model_path())
