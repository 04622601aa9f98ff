"""Vision-language models of transformers that read few tokens an image."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import drawn, snapshot
from torch import nn
from vision_language import FAMILIES, IDS, MARKS, SIGLIP, TEXT, K, encode, picture

from tokenlearner import connect, disconnect, insert, load_adapter, load_connected, save_model
from tokenlearner.layers import NeighborPooling, TokenConnector
from tokenlearner.models import ConnectionConfig, connect_processor, disconnected
from tokenlearner.models.connection import get_connection, learners_of

pytestmark = pytest.mark.filterwarnings(  # of torch's tensors, in the processor of PaliGemma
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
NAMES = [*FAMILIES]
SINGLE = [name for name in NAMES if name not in ("LlavaNext", "LlavaOnevision")]
TWO = ["* a b c", "d * e"], [[picture(0)], [picture(1)]]


def made(name: str, **options: Any) -> tuple[Any, Any]:
    """A model and its processor, connected; what is learned is drawn at random."""
    model, processor = FAMILIES[name]()
    connect(model, processor, K.get(name, 4), **options)
    for learner in learners_of(model):
        drawn(learner, 0.3)
    return model, processor


def mark(name: str, inputs: Any) -> torch.Tensor:
    """Where placeholders are."""
    word = {"Gemma3": "<image_soft_token>"}.get(name, MARKS.get(name, "<image>"))
    return inputs["input_ids"] == IDS[word]


# --- the count ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_k_placeholders_an_image(name: str) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    tiles = {"LlavaNext": 2, "LlavaOnevision": 2, "Idefics3": 5, "SmolVLM": 5}.get(name, 1)
    line_end = int(name in ("LlavaNext", "LlavaOnevision"))
    k = K.get(name, 4)
    assert mark(name, inputs).sum(1).tolist() == [tiles * k + line_end] * 2
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
@pytest.mark.parametrize("size", [(16, 16), (10, 40), (40, 10), (31, 33)])
def test_images_of_any_shape_are_counted_by_their_tiles(name: str, size: tuple[int, int]) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, ["* a"], [[picture(0, size)]])
    assert mark(name, inputs).sum() % 4 == 1
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_of_another_number_are_refused(name: str) -> None:
    model, processor = FAMILIES[name]()
    plain = encode(name, processor, *TWO)
    connect(model, processor, K.get(name, 4))
    with pytest.raises(ValueError, match=r"placeholders|do not match"):
        model(**plain)
    fewer = encode(name, processor, *TWO)
    with pytest.raises(ValueError, match="do not match"):
        disconnect(model, processor)(**fewer)


@pytest.mark.parametrize("name", SINGLE)
def test_texts_that_share_the_placeholders_wrongly_are_refused(name: str) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    where = mark(name, inputs)
    moved = inputs["input_ids"].clone()
    moved[0, where[0].nonzero()[0]] = IDS["a"]
    moved[1, (~where[1]).nonzero()[-1]] = inputs["input_ids"][where][0]
    with pytest.raises(ValueError, match=r"text 0 has \d+ placeholders.*connect_processor"):
        model(**{**inputs, "input_ids": moved})


# --- generating --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generating_with_a_cache_is_generating_without(name: str) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    fast, slow = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    for a, b in zip(fast.logits, slow.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_padded_text_is_answered_as_alone(name: str) -> None:
    model, processor = made(name)
    texts, images = ["* a b c d e f g h", "i * j"], TWO[1]
    both = encode(name, processor, texts, images)
    assert (both["attention_mask"][1] == 0).any()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    together = model.generate(**both, **options)[:, -4:]
    for i in range(2):
        alone = encode(name, processor, texts[i : i + 1], images[i : i + 1])
        assert torch.equal(model.generate(**alone, **options)[0, -4:], together[i])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "PaliGemma"])  # it needs an image
@torch.no_grad()
def test_a_text_without_an_image_is_that_of_the_model_before(name: str) -> None:
    model, processor = FAMILIES[name]()
    inputs = processor(text=["a b c", "d"], padding=True, return_tensors="pt")
    before = model(**inputs).logits
    connect(model, processor, K.get(name, 4))
    again = processor(text=["a b c", "d"], padding=True, return_tensors="pt")
    assert torch.equal(model(**again).logits, before)
    assert model.generate(**again).shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_several_images_in_a_text_are_each_seen(name: str) -> None:
    model, processor = made(name)
    images = [picture(i) for i in range(3)]
    texts = ["* a * b", "* c"]
    inputs = encode(name, processor, texts, [images[:2], images[2:]])
    first = model(**inputs).logits
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2
    for changed in ([images[0], picture(9)], [picture(9), images[1]]):
        other = encode(name, processor, texts, [changed, images[2:]])
        logits = model(**other).logits
        assert not torch.allclose(logits[0], first[0], atol=1e-3)
        torch.testing.assert_close(logits[1], first[1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_beams_and_samples_generate_too() -> None:
    model, processor = made("Llava")
    inputs = encode("Llava", processor, *TWO)
    assert model.generate(**inputs, num_beams=3, max_new_tokens=3).shape[0] == 2
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape[0] == 4


# --- the start, gradients, dtypes --------------------------------------------------------------


@torch.no_grad()
def test_averaging_gives_the_means_of_neighboring_positions() -> None:
    model, processor = FAMILIES["Llava"]()
    pixels = encode("Llava", processor, *TWO)["pixel_values"]
    positions = torch.stack([*model.get_image_features(pixels).pooler_output])
    connect(model, processor, 4, learner="pool")
    found = torch.stack([*model.get_image_features(pixels).pooler_output])
    expected = positions.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_all_that_is_learned(name: str) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    (model(**inputs).logits * torch.randn(TEXT["vocab_size"])).sum().backward()
    (learner,) = learners_of(model)
    moved = {n: p.grad.abs().max().item() for n, p in learner.named_parameters()}
    assert min(value for n, value in moved.items() if n != "attention_maps.3.bias") > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_connector_takes_the_dtype_of_its_model(dtype: torch.dtype) -> None:
    model, processor = FAMILIES["Llava"]()
    connect(model.to(dtype), processor, 4)
    inputs = encode("Llava", processor, *TWO).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = model(**inputs).logits
    exact = copy.deepcopy(model).float()(**inputs.to(torch.float32)).logits
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
def test_a_model_on_a_device_is_connected_there(device: torch.device) -> None:
    model, processor = FAMILIES["Llava"]()
    connect(model.to(device), processor, 4)
    inputs = encode("Llava", processor, *TWO).to(device)
    assert model(**inputs).logits.device.type == device.type


@pytest.mark.parametrize("name", ["Llava", "LlavaOnevision"])
@torch.no_grad()
def test_copies_and_pickles_compute_the_same_apart(name: str) -> None:
    model, processor = made(name)
    pickled = pickle.dumps(model)  # transformers hangs functions on it in the first forward
    inputs = encode(name, processor, *TWO)
    expected = model(**inputs).logits
    for again in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(again(**inputs).logits, expected)
        drawn(learners_of(again)[0], 1.0)
        assert torch.equal(model(**inputs).logits, expected)
    copied = encode(name, copy.deepcopy(processor), *TWO)
    assert torch.equal(copied["input_ids"], inputs["input_ids"])


# --- back --------------------------------------------------------------------------------------


def state_of(model: Any, processor: Any) -> Any:
    """All that connecting changes, of a model and of its processor."""
    parts = [model, model.model]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in parts]
    names = [sorted(vars(owner)) for owner in (*parts, processor)]
    texts = model.config.to_json_string(), json.dumps(processor.to_dict(), default=str)
    ignored = [sorted(m._keys_to_ignore_on_load_unexpected or ()) for m in parts]
    return *snapshot(model)[:2], hooks, names, texts, ignored


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_disconnecting_restores_model_and_processor_bit_for_bit(name: str) -> None:
    model, processor = FAMILIES[name]()
    inputs = encode(name, processor, *TWO)
    logits = model(**inputs).logits
    before = state_of(model, processor)
    connect(model, processor, K.get(name, 4))
    assert state_of(model, processor) != before
    assert disconnect(model, processor) is model
    assert state_of(model, processor) == before
    again = encode(name, processor, *TWO)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**again).logits, logits)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_connected_model_runs_on_all_positions_for_a_while(name: str) -> None:
    model, processor = FAMILIES[name]()
    logits = model(**encode(name, processor, *TWO)).logits
    connect(model, processor, K.get(name, 4))
    few = model(**encode(name, processor, *TWO)).logits
    with disconnected(model, processor):
        assert torch.equal(model(**encode(name, processor, *TWO)).logits, logits)
    assert torch.equal(model(**encode(name, processor, *TWO)).logits, few)


# --- files -------------------------------------------------------------------------------------


OTHER_PROCESS = """
import sys, torch, transformers
sys.path.insert(0, {tests!r})
from vision_language import encode, picture
from tokenlearner import load_connected
processor = transformers.AutoProcessor.from_pretrained({folder!r})
model = load_connected({folder!r}, processor)
inputs = encode({name!r}, processor, ["* a b c", "d * e"], [[picture(0)], [picture(1)]])
with torch.no_grad():
    torch.save((inputs["input_ids"], model(**inputs).logits), {folder!r} + "/found.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "SmolVLM"])  # num2words is not installed
@torch.no_grad()
def test_another_process_reads_the_whole_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = OTHER_PROCESS.format(
        tests=str(Path(__file__).parents[1]), folder=str(tmp_path), name=name
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    ids, logits = torch.load(tmp_path / "found.pt")
    assert torch.equal(ids, inputs["input_ids"])
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "SmolVLM"])
@torch.no_grad()
def test_a_saved_model_is_read_with_its_count_and_can_be_disconnected(
    name: str, tmp_path: Path
) -> None:
    model, processor = made(name)
    inputs = encode(name, processor, *TWO)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    again: Any = load_connected(tmp_path, loaded)
    assert type(again) is type(model)
    assert get_connection(again) == get_connection(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert torch.equal(encode(name, loaded, *TWO)["input_ids"], inputs["input_ids"])
    plain, own = FAMILIES[name]()
    assert disconnect(again, loaded).state_dict().keys() == plain.state_dict().keys()
    found, expected = (encode(name, p, *TWO)["input_ids"] for p in (loaded, own))
    assert torch.equal(found, expected)


def test_a_plain_class_refuses_a_connected_folder(tmp_path: Path) -> None:
    model, _ = made("Llava")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_without_a_connection_is_refused(tmp_path: Path) -> None:
    FAMILIES["Llava"]()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no connected model"):
        load_connected(tmp_path)


@pytest.mark.parametrize("learner", ["v11", "pool"])
@torch.no_grad()
def test_what_was_learned_is_written_alone(learner: str, tmp_path: Path) -> None:
    model, processor = made("Llava", learner=learner)
    inputs = encode("Llava", processor, *TWO)
    host = disconnect(copy.deepcopy(model))
    file = save_model(model, tmp_path, only="learned")
    assert file.stat().st_size < 40_000
    assert "4 tokens in place of all positions" in (tmp_path / "README.md").read_text()
    again = load_adapter(host, tmp_path)
    assert get_connection(again) == get_connection(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    _, fresh = FAMILIES["Llava"]()
    assert connect_processor(fresh, again) is fresh
    assert torch.equal(encode("Llava", fresh, *TWO)["input_ids"], inputs["input_ids"])


@torch.no_grad()
def test_a_fitted_projector_is_written_too(tmp_path: Path) -> None:
    model, processor = made("Llava")
    host = disconnect(copy.deepcopy(model))
    model.model.multi_modal_projector.projector.linear_2.bias += 1
    save_model(model, tmp_path / "a.safetensors", only="learned", host=host)
    inputs = encode("Llava", processor, *TWO)
    again = load_adapter(host, tmp_path / "a.safetensors")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_what_was_learned_goes_into_no_other_model(tmp_path: Path) -> None:
    model, _ = made("Llava")
    save_model(model, tmp_path / "a.safetensors", only="learned")
    with pytest.raises(ValueError, match="disconnect"):
        load_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(FAMILIES["Llava"]()[0], tmp_path / "a.safetensors")


@torch.no_grad()
def test_tokens_in_the_tower_and_a_connector_are_written_together(tmp_path: Path) -> None:
    model, processor = FAMILIES["Llava"]()
    host = copy.deepcopy(model)
    connect(insert(model, 4, 1, fuse=True), processor, 4)
    save_model(model, tmp_path / "a.safetensors", only="learned")
    inputs = encode("Llava", processor, *TWO)
    again = load_adapter(host, tmp_path / "a.safetensors")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# --- videos ------------------------------------------------------------------------------------


def clips(count: int = 2, frames: int = 4) -> list[np.ndarray]:
    return [np.stack([np.array(picture(10 * i + t)) for t in range(frames)]) for i in range(count)]


def encode_clips(processor: Any, videos: Any) -> Any:
    texts = ["<video> a b", "<video> c"][: len(videos)]
    options = {"padding": True, "return_tensors": "pt", "do_sample_frames": False}
    return processor(text=texts, videos=videos, **options)


@torch.no_grad()
def test_each_frame_of_a_video_has_k_tokens() -> None:
    model, processor = made("LlavaOnevision")
    inputs = encode_clips(processor, clips())
    assert (inputs["input_ids"] == IDS["<video>"]).sum(1).tolist() == [4 * 4 + 1] * 2
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("name", ["SmolVLM", "InternVL"])
@torch.no_grad()
def test_frames_that_are_images_have_k_tokens_too(name: str) -> None:
    model, processor = made(name)
    inputs = encode_clips(processor, clips(1))
    assert mark(name, inputs).sum() == 4 * 2
    assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_tokens_of_a_clip_are_learned_over_time() -> None:
    model, processor = made("LlavaOnevision", video_tokens=8, num_frames=4)
    inputs = encode_clips(processor, clips())
    assert (inputs["input_ids"] == IDS["<video>"]).sum(1).tolist() == [8 + 1] * 2
    logits = model(**inputs).logits
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2
    again = copy.deepcopy(model)
    for learner in learners_of(model):
        nn.init.zeros_(learner.places)
    assert not torch.equal(model(**inputs).logits, logits)
    assert torch.equal(again(**inputs).logits, logits)


@torch.no_grad()
def test_tokens_of_a_clip_start_as_means_over_time_and_space() -> None:
    model, processor = FAMILIES["LlavaOnevision"]()
    connect(model, processor, 4, learner="pool")
    inputs = encode_clips(processor, clips())
    each = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    connect(
        disconnect(model, processor), processor, 4, learner="pool", video_tokens=4, num_frames=4
    )
    found = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    expected = each[:, :-1].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(found[:, :-1], expected)
    assert torch.equal(found[:, -1], each[:, -1])


def test_a_clip_of_another_length_is_refused() -> None:
    _, processor = made("LlavaOnevision", video_tokens=8, num_frames=4)
    with pytest.raises(ValueError, match=r"3 frames.*num_frames=4"):
        encode_clips(processor, clips(1, 3))


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 17}, "num_tokens is 17.*pass 16"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": 4, "learner": "v1"}, "learner is 'v1'"),
        ({"num_tokens": 4, "video_tokens": 8}, "pass both"),
        ({"num_tokens": 4, "video_tokens": 8, "num_frames": 4}, "video_tokens is 8"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_changed(
    options: dict[str, Any], message: str
) -> None:
    model, processor = FAMILIES["Llava"]()
    before = state_of(model, processor)
    with pytest.raises(ValueError, match=message):
        connect(model, processor, **options)
    assert state_of(model, processor) == before


def test_a_processor_of_another_family_is_refused_before_anything_is_changed() -> None:
    model, processor = FAMILIES["Llava"]()
    before = state_of(model, processor)
    with pytest.raises(ValueError, match="Gemma3Processor"):
        connect(model, FAMILIES["Gemma3"]()[1], 4)
    with pytest.raises(ValueError, match="Idefics3Processor"):
        connect(FAMILIES["InternVL"]()[0], FAMILIES["Idefics3"]()[1], 2)
    assert state_of(model, processor) == before


def test_connecting_twice_and_disconnecting_what_is_not_are_refused() -> None:
    model, processor = made("Llava")
    with pytest.raises(ValueError, match="connected already"):
        connect(model, processor, 4)
    disconnect(model, processor)
    for call in (disconnect, learners_of, lambda model: disconnected(model).__enter__()):
        with pytest.raises(ValueError, match="not connected"):
            call(model)


def test_a_processor_that_was_not_connected_is_not_restored_blindly() -> None:
    model, processor = FAMILIES["Llava"]()
    connect(model, None, 4)
    with pytest.raises(ValueError, match="without its processor"):
        disconnect(model, processor)
    disconnect(model)
    assert get_connection(model) is None


def test_other_models_are_refused_with_the_names_of_those_that_are_not() -> None:
    with pytest.raises(ValueError, match=r"Linear is no vision-language model.*LlavaOnevision"):
        connect(nn.Linear(2, 2), None, 4)


def test_a_tower_whose_positions_are_not_known_is_refused() -> None:
    vision = {"model_type": "pixtral", "hidden_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 4}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=TEXT, image_token_index=IDS["<image>"]
    )
    with pytest.raises(ValueError, match=r"pixtral.*siglip_vision_model"):
        connect(transformers.LlavaForConditionalGeneration(config), None, 4)


def test_a_dropped_position_that_is_no_class_token_is_refused() -> None:
    options = {"image_token_index": IDS["<image>"], "vision_feature_select_strategy": "default"}
    config = transformers.LlavaConfig(vision_config=SIGLIP, text_config=TEXT, **options)
    with pytest.raises(ValueError, match='"full"'):
        connect(transformers.LlavaForConditionalGeneration(config), None, 4)


def test_insert_names_connect_for_models_that_count_image_tokens() -> None:
    with pytest.raises(ValueError, match="connect"):
        insert(FAMILIES["Llava"]()[0], 4, 1)


def test_what_a_model_is_connected_with_is_kept_in_its_config() -> None:
    model, _ = made("Llava", learner="pool")
    connection = get_connection(model)
    assert isinstance(connection, ConnectionConfig)
    assert connection.to_kwargs() == {
        "num_tokens": 4,
        "learner": "pool",
        "video_tokens": None,
        "num_frames": None,
    }
    connector = model.model.multi_modal_projector
    assert isinstance(connector, TokenConnector)
    assert isinstance(connector.learner, NeighborPooling)
