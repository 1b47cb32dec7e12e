import importlib.util
import subprocess
import sys

import pytest

from ibq_jax.base.unimported import unimported


def test_the_library_is_not_found_within_the_block_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with unimported("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with unimported("colorsys"):
        import colorsys as again
    assert again is colorsys is sys.modules["colorsys"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_training_does_not_import_pytorch():
    program = "import sys, ibq_jax.commands.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
