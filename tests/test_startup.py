"""What a script imports before it knows what it is asked."""

import subprocess
import sys

from tests.conftest import ROOT

SLOW = {"timm", "torchvision", "sklearn", "matplotlib", "onnx", "onnx2torch", "tensorboard", "torch._dynamo"}


def test_help_waits_for_no_slow_library():
    code = f"import sys, train_forget, train_pretrain, test, scripts.compare; print({SLOW!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
