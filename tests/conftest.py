"""Everything runs offline, on the CPU, with models built in memory."""

import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

import pytest
import torch

torch.set_num_threads(1)
sys.modules["fla"] = None  # its kernels need a GPU; newer versions of transformers call them on a CPU too


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_plugins_left():
    yield
    import sys

    base = sys.modules.get("axolotl.integrations.base")
    if base is not None:
        base.PluginManager.get_instance().plugins.clear()


@pytest.fixture(autouse=True)
def _no_attention_patch_left():
    """Axolotl's LoRA kernels replace the class's `forward` with one that other models of the process cannot run."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward
    yield
    if LlamaAttention.forward is not forward:
        LlamaAttention.forward = forward
        del LlamaAttention._original_forward


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    from tests.support.workspace import Workspace

    return Workspace(tmp_path_factory.mktemp("workspace"))
