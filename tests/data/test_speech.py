"""What decoders write of recordings: figures against transformers and jiwer, one recording at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from support import tiny
from support.answers import calibrated, flops_of, moments_by_hand

import lrsurgery
import lrsurgery.hf
from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import task_of
from lrsurgery.errors import DataError, RecipeError

# in the order of Whisper's own, by which its tokenizer counts languages
MARKS = ("startoftranscript", "en", "zh", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
RATE = 16_000
WORDS = ["return", "a", "value", "from", "the", "statement"]


def whisper_tokenizer() -> Any:
    """The real class of Whisper's tokenizers, over the tiny vocabulary."""
    known = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in known["merges"]]
    made = tf.WhisperTokenizer(vocab=known["vocab"], merges=merges, pad_token="<|endoftext|>")
    made.add_tokens([f"<|{mark}|>" for mark in (*MARKS, "notimestamps")], special_tokens=True)
    return made


def save_listener(folder: Path, kind: str = "whisper") -> Path:
    """A model that hears a second of sound (Whisper), or as much as there is (Moonshine), and its own files."""
    torch.manual_seed(0)
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()
    }
    if kind == "whisper":
        tokenizer = whisper_tokenizer()
        begin = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": begin}
        free = {"suppress_tokens": None, "begin_suppress_tokens": None}
        sizes = {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 40}
        config: Any = tf.WhisperConfig(vocab_size=len(tokenizer), **sizes, **layers, **tokens, **free)
        model: Any = tf.WhisperForConditionalGeneration(config)
        model.generation_config._from_model_config = False  # as on the hub: a file of its own, which is read
        model.generation_config.is_multilingual = True
        model.generation_config.lang_to_id = {f"<|{name}|>": begin + 1 + i for i, name in enumerate(MARKS[1:4])}
        model.generation_config.task_to_id = {"translate": begin + 4, "transcribe": begin + 5}
        model.generation_config.no_timestamps_token_id = len(tokenizer) - 1
        tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    else:
        tokenizer = tiny.tokenizer()
        tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
        names = ("encoder_num_hidden_layers", "decoder_num_hidden_layers")
        heads = {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder")}
        model = tf.MoonshineForConditionalGeneration(
            tf.MoonshineConfig(vocab_size=tiny.VOCABULARY, **sizes, **tokens, **heads, **dict.fromkeys(names, 1))
        )
        extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False, return_attention_mask=True)
        extractor.save_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoken(count: int = 10) -> list[dict[str, Any]]:
    """Tones of several lengths; how many words are said goes by the pitch."""
    rows = []
    for i in range(count):
        time = np.arange(8_000 + 700 * (i % 4)) / RATE
        sound = np.sin(2 * np.pi * (200 + 150 * (i % 5)) * time) + 0.1 * np.cos(7000 * time * (1 + i))
        audio = {"array": sound.astype(np.float32).tolist(), "sampling_rate": RATE}
        rows.append({"audio": audio, "text": " ".join(WORDS[: 2 + i % 5])})
    return rows


def write_speech(file: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


def inputs_of(folder: Path, rows: list[dict[str, Any]], language: str | None = None) -> list[dict[str, Any]]:
    """What transformers' own recipe for Whisper makes of the rows, one at a time."""
    extractor, tokenizer = tf.AutoFeatureExtractor.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    begin = tf.AutoConfig.from_pretrained(folder).decoder_start_token_id
    if language is not None:
        tokenizer.set_prefix_tokens(language=language, task="transcribe")
    found = []
    for row in rows:
        made = extractor(np.asarray(row["audio"]["array"], np.float32), sampling_rate=RATE, return_tensors="pt")
        labels = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        found.append({**made, "labels": labels[:, 1:] if int(labels[0, 0]) == begin else labels})
    return found


def heard_by_hand(
    folder: Path, rows: list[dict[str, Any]], new_tokens: int = 0, language: str | None = None
) -> dict[str, float]:
    """transformers' own loss on labels, and jiwer on what the model generates, one recording at a time."""
    import jiwer

    model = tf.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    total, count, hits, texts = 0.0, 0, 0, []
    for inputs in inputs_of(folder, rows, language):
        with torch.no_grad():
            out = model(**inputs)
            if new_tokens:
                told = {"language": language, "task": "transcribe"} if language else {}
                sound = {name: value for name, value in inputs.items() if name != "labels"}
                ids = model.generate(**sound, **told, max_new_tokens=new_tokens, do_sample=False)
                texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        total, count = total + float(out.loss) * inputs["labels"].numel(), count + inputs["labels"].numel()
        hits += int(out.logits.argmax(-1).eq(inputs["labels"]).sum())
    figures = {"loss": total / count, "scored": float(count), "top1": hits / count}
    figures["perplexity"] = float(torch.tensor(total / count, dtype=torch.float64).exp())
    return {**figures, "wer": jiwer.wer([row["text"] for row in rows], texts)} if new_tokens else figures


@pytest.fixture(scope="module")
def listeners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listeners")
    for kind in ("whisper", "moonshine"):
        save_listener(folder / kind, kind)
    rows = write_speech(folder / "rows.parquet", spoken())
    command = ["finetune", folder / "whisper", "--data", rows, "--eval-data", rows, "--rank", "0.5", "--steps", "60"]
    command += ["--lr", "1e-2", "--batch-size", "5", "--teacher", folder / "whisper", "--teacher-weight", "0.02"]
    assert tiny.run(*command, "--language", "en", "--output", folder / "half", "--device", "cpu", "--quiet") == 0
    return folder


@pytest.mark.parametrize("batch", [1, 4])
def test_word_errors_are_those_of_jiwer(listeners: Path, batch: int) -> None:
    options = DataOptions(generate=20, language="en")
    found = lrsurgery.evaluate(listeners / "half", listeners / "rows.parquet", options, batch_size=batch)
    wanted = heard_by_hand(listeners / "half", spoken(), 20, "en")
    assert found.task == "speech-seq2seq"
    assert {name: found.values[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert wanted["wer"] < 1  # it has learnt something of it
    assert wanted["loss"] < heard_by_hand(listeners / "whisper", spoken(), 0, "en")["loss"]


@pytest.mark.parametrize("kind", ["whisper", "moonshine"])
def test_recordings_of_several_lengths_are_fed_as_each_alone(listeners: Path, kind: str) -> None:
    found = lrsurgery.evaluate(listeners / kind, listeners / "rows.parquet", batch_size=4)
    assert found.task == "speech-seq2seq"
    assert found.values == pytest.approx(heard_by_hand(listeners / kind, spoken()), rel=1e-5)


def test_a_language_is_part_of_the_transcript(listeners: Path) -> None:
    rows = listeners / "rows.parquet"
    english, german, none = (
        lrsurgery.evaluate(listeners / "whisper", rows, DataOptions(language=each)) for each in ("en", "de", None)
    )
    assert english.values == pytest.approx(heard_by_hand(listeners / "whisper", spoken(), 0, "en"), rel=1e-5)
    assert german.values["loss"] != english.values["loss"]
    assert any("no --language" in note for note in none.notes)
    assert not any("no --language" in note for note in english.notes)


def test_calibration_hears_as_well(listeners: Path, tmp_path: Path) -> None:
    data = write_speech(tmp_path / "five.parquet", spoken(5))
    model = tf.AutoModelForSpeechSeq2Seq.from_pretrained(listeners / "whisper").eval()
    for importance in ("activations", "fisher"):
        found = calibrated(listeners / "whisper", data, tmp_path / importance, "--importance", importance)
        for layer in ("encoder.layers.0.fc1", "decoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj"):
            wanted = moments_by_hand(model, f"model.{layer}", inputs_of(listeners / "whisper", spoken(5)))
            torch.testing.assert_close(found.moments(f"model.{layer}").inputs, wanted, rtol=1e-4, atol=1e-6)


def test_recordings_are_benched(listeners: Path) -> None:
    work, unit, flops = flops_of(listeners / "half")
    assert (work, unit) == ("forward", "recordings")
    assert flops < flops_of(listeners / "whisper")[-1]


def test_features_are_fed_as_they_are(listeners: Path, tmp_path: Path) -> None:
    inputs = inputs_of(listeners / "whisper", spoken())
    ready = [
        {"input_features": each["input_features"][0].tolist(), "text": row["text"]}
        for each, row in zip(inputs, spoken(), strict=True)
    ]
    data = write_speech(tmp_path / "ready.parquet", ready)
    found = lrsurgery.evaluate(listeners / "whisper", data)
    assert found.values == pytest.approx(heard_by_hand(listeners / "whisper", spoken()), rel=1e-5)


def test_what_does_not_fit_is_one_line(listeners: Path, tmp_path: Path) -> None:
    rows = listeners / "rows.parquet"
    with pytest.raises(RecipeError, match=r"^generate 40: the decoder takes 40; write at most 36$"):
        lrsurgery.evaluate(listeners / "whisper", rows, DataOptions(generate=40))
    with pytest.raises(RecipeError, match=r"^language xx: Unsupported language"):
        lrsurgery.evaluate(listeners / "whisper", rows, DataOptions(language="xx"))
    with pytest.raises(RecipeError, match=r"^language fr: .* has no token for it"):
        lrsurgery.evaluate(listeners / "whisper", rows, DataOptions(language="fr"))
    with pytest.raises(RecipeError, match=r"^language en: .* has no tokens of languages"):
        lrsurgery.evaluate(listeners / "moonshine", rows, DataOptions(language="en"))
    silent = write_speech(tmp_path / "silent.parquet", [{"text": "a value"}])
    with pytest.raises(DataError, match="which column holds the audio"):
        lrsurgery.evaluate(listeners / "whisper", silent)
    slow = [{**row, "audio": {**row["audio"], "sampling_rate": 8000}} for row in spoken(2)]
    with pytest.raises(DataError, match="sound 0 has 8,000 samples a second, the model takes 16,000"):
        lrsurgery.evaluate(listeners / "whisper", write_speech(tmp_path / "slow.parquet", slow))


def test_a_decoder_that_reads_sound_among_its_tokens_has_no_task(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    folder.mkdir()
    config = {"architectures": ["Qwen3ASRForConditionalGeneration"], "model_type": "qwen3_asr"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tiny.save_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(RecipeError, match="is for none of"):
        task_of(resolve(str(folder)))
