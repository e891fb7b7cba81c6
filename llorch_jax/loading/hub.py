"""Models from the Hugging Face hub, through `huggingface_hub` and its cache."""

import os
import re
from pathlib import Path

from llorch_jax.errors import CheckpointError
from llorch_jax.loading.safetensors_files import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS

# Files to download: no pickled weights, no other frameworks' files, nothing from folders such as onnx/.
PATTERNS = (
    CONFIG,
    GENERATION_CONFIG,
    "model*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FILE = re.compile(r".*\.(safetensors|json|bin|pt|pth|ckpt|gguf)", re.ASCII)


def is_repo_id(source: str | os.PathLike[str]) -> bool:
    """Whether a name that is not a directory may be a hub id: `name` or `owner/name`.

    Path objects, file names, and names below an existing directory are treated as paths.
    """
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source) or _FILE.fullmatch(source):
        return False
    owner, slash, _ = source.partition("/")
    return not (slash and Path(owner).is_dir())


def download(repo_id: str, revision: str | None = None) -> Path:
    """The directory with a repository's configuration, safetensors weights and tokenizer, in the hub's cache.

    Files in the cache are not downloaded again; with HF_HUB_OFFLINE=1 in the environment nothing is downloaded.

    Args:
        repo_id: such as `openai-community/gpt2`.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        CheckpointError: there is no such repository or revision, it has no safetensors weights, this user has no
            access to it, or it is neither cached nor reachable.
    """
    import huggingface_hub  # takes longer to import than the rest of the package

    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # it also passes on errors of its HTTP library, which differs between versions
        raise CheckpointError(_explain(repo_id, revision, error)) from None
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise CheckpointError(
            f"{repo_id}: expected {WEIGHTS} or {INDEX} in the repository, found neither; pickled weights "
            "(pytorch_model.bin) are never loaded: choose a revision or a repository with safetensors"
        )
    return folder


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    """One line that says why a download failed."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{repo_id}: expected a directory or a hub id such as openai-community/gpt2, got neither"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id}: access is restricted; ask for it on the repository's page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: expected a branch, tag or commit of the repository, got revision {revision!r:.80}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo_id}: expected a directory or a public repository on the hub, found neither; check the name"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        neither = f"{repo_id}: expected a directory, or a repository whole in the hub's cache, found neither"
        if isinstance(error.__cause__ or error, errors.OfflineModeIsEnabled):
            return f"{neither}, and HF_HUB_OFFLINE forbids downloading; unset it"
        return f"{neither}, and the hub cannot be reached; check the network"
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{repo_id}: downloading failed ({type(error).__name__}: {reason}); check the network and try again"
