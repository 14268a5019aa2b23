"""Agreement with a teacher against sums by hand: losses, gradients, figures, and what is compared by which loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from support import zoo
from torch import Tensor, nn

import lrsurgery
from lrsurgery.data.unlabelled.agreement import BINARY, COSINE, KL, MSE, find_agreement
from lrsurgery.errors import SourceError

NAMES = ("text_embeds", "image_embeds")
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])


def two(cls: Any, config: Any) -> tuple[nn.Module, nn.Module]:
    """A model and a teacher of other weights."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = cls(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        found.append(model)
    return found[0], found[1]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check(model: nn.Module, loss: Tensor, by_hand: Tensor) -> None:
    """Both the value and every gradient."""
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-7)
    ours, theirs = gradients(model, loss), gradients(model, by_hand)
    assert len(ours) == len(theirs) > 5
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).pow(2).sum() / theirs.pow(2).sum()


def test_an_encoders_loss_and_gradient_are_those_by_hand() -> None:
    model, teacher = two(tf.BertModel, tf.BertConfig(**zoo.BERT))
    batch = {"input_ids": zoo.IDS, "attention_mask": MASK}
    agreement = find_agreement(model, teacher, batch, "teacher")
    assert [(each.name, each.how) for each in agreement.outputs] == [("last_hidden_state", MSE), ("pooler_output", MSE)]
    answers = teacher(**batch)

    def by_hand() -> Tensor:
        # rows without their padding, one after the other
        ours = [model(input_ids=zoo.IDS[i : i + 1, :n]) for i, n in enumerate((8, 5))]
        with torch.no_grad():
            theirs = [teacher(input_ids=zoo.IDS[i : i + 1, :n]) for i, n in enumerate((8, 5))]
        return sum(
            relative(torch.cat([e[i].flatten() for e in ours]), torch.cat([e[i].flatten() for e in theirs])) / 2
            for i in (0, 1)
        )  # type: ignore[return-value]

    check(model, agreement.loss(model(**batch), answers, batch, 2.0), by_hand())


def test_a_sequence_models_loss_and_gradient_are_those_by_hand() -> None:
    model, teacher = two(tf.T5ForConditionalGeneration, tf.T5Config(**zoo.T5, decoder_start_token_id=0))
    batch = {"input_ids": zoo.IDS, "attention_mask": MASK, "decoder_input_ids": zoo.IDS[:, :6]}
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    agreement = find_agreement(model, teacher, batch, "teacher")
    assert [(e.name, e.how) for e in agreement.outputs] == [("logits", KL), ("encoder_last_hidden_state", MSE)]
    with torch.no_grad():
        answers = teacher(**batch)

    def by_hand() -> Tensor:
        ours = model(**batch)
        counted, encoded = batch["decoder_attention_mask"].bool(), MASK.bool()
        p = (answers.logits[counted] / 3).softmax(-1)
        q = (ours.logits[counted] / 3).softmax(-1)
        divergence = 9 * (p * (p / q).log()).sum(-1).mean()
        states = (ours.encoder_last_hidden_state[encoded], answers.encoder_last_hidden_state[encoded])
        return (divergence + relative(*states)) / 2

    check(model, agreement.loss(model(**batch), answers, batch, 3.0), by_hand())


def test_embeddings_loss_and_gradient_are_those_by_hand() -> None:
    model, teacher = two(tf.CLIPModel, zoo.TRANSFORMERS["clip"].config())
    batch = zoo.TRANSFORMERS["clip"].inputs
    agreement = find_agreement(model, teacher, batch, "teacher")
    assert [(e.name, e.how) for e in agreement.outputs] == [("text_embeds", COSINE), ("image_embeds", COSINE)]
    assert agreement.left_out == ("logits_per_image", "logits_per_text")
    with torch.no_grad():
        answers = teacher(**batch)

    def by_hand() -> Tensor:
        ours = model(**batch)
        cosines = [(ours[n] * answers[n]).sum(-1) / ours[n].norm(dim=-1) / answers[n].norm(dim=-1) for n in NAMES]
        return 1 - torch.cat(cosines).mean()

    check(model, agreement.loss(model(**batch), answers, batch, 2.0), by_hand())


@pytest.mark.parametrize("name", ["bert", "t5", "clip", "whisper", "vit", "swin", "wav2vec2"])
def test_a_model_of_full_rank_has_no_loss(name: str) -> None:
    teacher = zoo.build_transformers(name)
    model = zoo.build_transformers(name)
    lrsurgery.factorise_(model, rank=1.0, allow_larger=True)
    assert lrsurgery.factorised_layers(model)
    batch = zoo.TRANSFORMERS[name].inputs
    agreement = find_agreement(model, teacher, batch, "teacher")
    with torch.no_grad():
        ours, theirs = model(**batch), teacher(**batch)
    loss = float(agreement.loss(ours, theirs, batch, 2.0))
    figures = agreement.summarise(agreement.measure(ours, theirs, batch))
    assert abs(loss) < 1e-6
    assert abs(figures["loss"]) < 1e-6
    assert figures.get("top1", 1.0) == 1.0
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        assert float(agreement.loss(model(**batch), theirs, batch, 2.0)) > 1e-5


def test_figures_do_not_depend_on_batches() -> None:
    model, teacher = two(tf.BertForSequenceClassification, tf.BertConfig(**zoo.BERT, num_labels=5))
    batch = {"input_ids": zoo.IDS, "attention_mask": MASK}
    agreement = find_agreement(model, teacher, batch, "teacher")
    with torch.no_grad():
        whole = agreement.measure_batch(model, lambda b: teacher(**b), model, batch)
        rows = [
            agreement.measure(model(zoo.IDS[i : i + 1, :n]), teacher(zoo.IDS[i : i + 1, :n]), {})
            for i, n in enumerate((8, 5))
        ]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-4, atol=1e-6)


class Says(nn.Module):
    """A model that returns what it is given."""

    def __init__(self, config: dict[str, Any] | None = None, **outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs
        self.config = SimpleNamespace(**(config or {}))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return self.outputs


CHOICES: list[tuple[str, dict[str, Any], dict[str, Tensor], dict[str, str]]] = [
    ("classes", {}, {"logits": torch.zeros(2, 5)}, {"logits": KL}),
    ("a reward", {}, {"logits": torch.zeros(2, 1)}, {"logits": MSE}),
    ("numbers", {"problem_type": "regression"}, {"logits": torch.zeros(2, 3)}, {"logits": MSE}),
    ("any classes", {"problem_type": "multi_label_classification"}, {"logits": torch.zeros(2, 3)}, {"logits": BINARY}),
    ("a map of classes", {}, {"logits": torch.zeros(2, 4, 8, 8)}, {"logits": KL}),
    ("a map of one class", {}, {"logits": torch.zeros(2, 1, 8, 8)}, {"logits": BINARY}),
    (
        "a detector with a class for nothing",
        {"num_labels": 4},
        {"logits": torch.zeros(2, 9, 5), "pred_boxes": torch.zeros(2, 9, 4)},
        {"logits": KL, "pred_boxes": MSE},
    ),
    (
        "a detector without one",
        {"num_labels": 5},
        {"logits": torch.zeros(2, 9, 5), "pred_boxes": torch.zeros(2, 9, 4)},
        {"logits": BINARY, "pred_boxes": MSE},
    ),
    (
        "masks",
        {},
        {"class_queries_logits": torch.zeros(2, 9, 5), "masks_queries_logits": torch.zeros(2, 9, 8, 8)},
        {"class_queries_logits": KL, "masks_queries_logits": BINARY},
    ),
    (
        "similarities alone",
        {},
        {"logits_per_image": torch.zeros(2, 2), "loss": torch.zeros(())},
        {"logits_per_image": KL},
    ),
]


@pytest.mark.parametrize(("config", "outputs", "how"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_each_output_has_its_loss(config: dict[str, Any], outputs: dict[str, Tensor], how: dict[str, str]) -> None:
    model = Says(config, **outputs)
    found = find_agreement(model, model, {"x": torch.zeros(2, 3)}, "teacher")
    assert {each.name: each.how for each in found.outputs} == how


def test_maps_of_a_backbone_are_compared_one_by_one() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 6, 2, 2)]
    others = [each + 0.1 for each in maps]
    model, teacher = Says(feature_maps=tuple(others)), Says(feature_maps=tuple(maps))
    agreement = find_agreement(model, teacher, {"x": torch.zeros(2, 3)}, "teacher")
    wanted = sum(relative(other, each) for other, each in zip(others, maps, strict=True)) / 2
    assert float(agreement.loss(model.outputs, teacher.outputs, {}, 1.0)) == pytest.approx(float(wanted))
    assert [(each.name, each.axis, each.width) for each in agreement.outputs] == [
        ("feature_maps.0", 1, 3),
        ("feature_maps.1", 1, 6),
    ]


def test_a_teacher_that_returns_other_things_is_refused() -> None:
    x = {"x": torch.zeros(2, 3)}
    with pytest.raises(SourceError, match="returns logits, and the model last_hidden_state; nothing can be compared"):
        find_agreement(Says(last_hidden_state=torch.zeros(2, 4, 8)), Says(logits=torch.zeros(2, 5)), x, "teacher")
    with pytest.raises(SourceError, match=r"its logits has the shape \(6,\), the model's \(5,\)"):
        find_agreement(Says(logits=torch.zeros(2, 5)), Says(logits=torch.zeros(2, 6)), x, "teacher")
