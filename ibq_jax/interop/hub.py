"""Downloads of weights from the Hugging Face hub, hf://OWNER/NAME, with the package huggingface_hub.

The environment variable HF_ENDPOINT selects another server, HF_TOKEN gives access to private repositories, and HF_HOME
is the folder of the downloaded files.
"""

import os
from pathlib import Path

from ibq_jax.base.errors import UsageError, one_line

SCHEME = "hf://"

# The file of each published repository (arXiv 2412.02692, github.com/TencentARC/SEED-Voken; Emu3.5: arXiv 2510.26583).
PUBLISHED = {
    "TencentARC/IBQ-Tokenizer-1024": "imagenet256_1024.ckpt",
    "TencentARC/IBQ-Tokenizer-8192": "imagenet256_8192.ckpt",
    "TencentARC/IBQ-Tokenizer-16384": "imagenet256_16384.ckpt",
    "TencentARC/IBQ-Tokenizer-262144": "imagenet256_262144.ckpt",
    "TencentARC/IBQ-Tokenizer-16384-Pretrain": "IBQ_pretrain_16384.ckpt",
    "TencentARC/IBQ-Tokenizer-262144-Pretrain": "IBQ_pretrain_262144.ckpt",
    "TencentARC/IBQ-AR-B": "AR_256_B.ckpt",
    "TencentARC/IBQ-AR-L": "AR_256_L.ckpt",
    "TencentARC/IBQ-AR-XL": "AR_256_XL.ckpt",
    "TencentARC/IBQ-AR-XXL": "AR_256_XXL.ckpt",
    "BAAI/Emu3.5-VisionTokenizer": "model.safetensors",
}
OURS = "model.safetensors"  # what `convert --hub` writes


def download_if_hub(source: str | Path) -> Path:
    """Returns `source` as a path; if it is hf://OWNER/NAME[/FILE][@REVISION], the file, downloaded if necessary.

    Raises UsageError if the address has another form, the package is not installed, or the download fails.
    """
    text = str(source)
    if not text.startswith(SCHEME):
        return Path(source)
    path, _, revision = text.removeprefix(SCHEME).partition("@")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise UsageError(f"{text}: write {SCHEME}OWNER/NAME, or {SCHEME}OWNER/NAME/FILE")
    repository = f"{owner}/{name}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UsageError(f"{text}: needs huggingface_hub: pip install -r requirements-hub.txt") from error
    try:
        named = file or PUBLISHED.get(repository, OURS)
        endpoint = os.environ.get("HF_ENDPOINT")  # the package itself looks only when it is imported
        return Path(hf_hub_download(repository, named, revision=revision or None, endpoint=endpoint))
    except Exception as error:  # of the network, of the hub, of the disk: each library underneath has its own
        raise UsageError(f"{text}: not downloaded ({one_line(error)})") from error
