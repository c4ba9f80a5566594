"""Whether a step is recorded, to be run again at other lengths."""

import torch


def is_recorded(device: torch.device) -> bool:
    """Whether ``torch.compile`` traces what runs now, or a CUDA graph captures it."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
