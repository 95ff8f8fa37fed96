"""What goes wrong in a handler, as one sentence on the page."""

import functools
from collections.abc import Callable

import gradio as gr


def plainly(handler: Callable) -> Callable:
    """The handler, with this project's own errors shown as their sentence; any other is a defect and stays one."""

    @functools.wraps(handler)
    def shown(*values):
        try:
            return handler(*values)
        except ValueError as error:
            if type(error).__module__.split(".")[0] not in ("zo_engine", "app"):
                raise
            raise gr.Error(str(error), title="This cannot be done", duration=None, print_exception=False) from None
        except OSError as error:
            if error.errno is None:
                raise
            sentence = f"{error.filename or 'the disk'}: {(error.strerror or 'cannot be used').lower()}"
            raise gr.Error(sentence, title="The disk said no", duration=None, print_exception=False) from None

    return shown
