"""record and replay on models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moerouters import Gating, MoELayer, Router, Tape, attach, record, replay, swap
from moerouters.errors import TraceError

from .zoo import router_classes, tiny_inputs, tiny_model


def model_of(name: str) -> nn.Module:
    return tiny_model(next(each for each in router_classes() if each.name == name))


@pytest.fixture
def qwen() -> nn.Module:
    return model_of("Qwen3MoeTopKRouter")


def gates(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


def test_a_replayed_pass_routes_as_the_recorded_one(qwen: nn.Module) -> None:
    """Also after the gate has changed, which would choose otherwise; and gradients still reach it."""
    swap(qwen, "topk")
    inputs = tiny_inputs(qwen)
    with record(qwen) as tape, torch.no_grad():
        qwen(**inputs)
    assert {len(passes) for passes in tape.expert_ids.values()} == {1}
    assert all(ids.dtype == torch.int16 and ids.shape == (2, 12, 2) for (ids,) in tape.expert_ids.values())
    with torch.no_grad():
        for gate in gates(qwen):
            gate.weight.neg_()
        with record(qwen) as free:
            qwen(**inputs)
    assert not same(free, tape)
    qwen.train()
    with replay(qwen, tape):
        qwen(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates(qwen))
    with replay(qwen, tape), pytest.raises(TraceError, match=r"runs for the 2th time, but the tape has 1 passes"):
        qwen(**inputs)
        qwen(**inputs)


@pytest.mark.parametrize("router", ["topk", "loss-free", "bip"])
def test_a_rollout_is_replayed_in_one_training_pass(qwen: nn.Module, router: str) -> None:
    """Prompt and single tokens, joined along the sequence, are what the pass over the whole text takes."""
    swap(qwen, router)
    prompt = tiny_inputs(qwen)["input_ids"]
    with record(qwen) as tape:
        text = qwen.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert {len(passes) for passes in tape.expert_ids.values()} == {5}
    whole = tape.joined()
    qwen.train()
    with replay(qwen, whole):
        replayed = qwen(text[:, :-1], labels=text[:, :-1])
    with torch.no_grad():
        stepwise = qwen.eval()(text[:, :-1])
    torch.testing.assert_close(replayed.logits, stepwise.logits)
    replayed.loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_takes_the_ids_of_its_pass(qwen: nn.Module, use_reentrant: bool) -> None:
    """Gradients with checkpointing equal those without, while the tape says other ids than the gate would."""
    swap(qwen, "topk")
    inputs = tiny_inputs(qwen)
    with record(qwen) as tape, torch.no_grad():
        qwen(**inputs)
    other = Tape(expert_ids={n: [(p[0] + 1) % 8] for n, p in tape.expert_ids.items()}, num_experts=tape.num_experts)

    def gradient() -> Tensor:
        qwen.zero_grad()
        with replay(qwen, other):
            qwen(**inputs, labels=inputs["input_ids"]).loss.backward()
        return torch.cat([gate.weight.grad.reshape(-1) for gate in gates(qwen)])

    qwen.train()
    plain = gradient()
    qwen.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(gradient(), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_not_recorded(qwen: nn.Module, use_reentrant: bool) -> None:
    swap(qwen, "topk")
    qwen.train()
    qwen.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = tiny_inputs(qwen)
    with record(qwen) as tape:
        qwen(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {len(passes) for passes in tape.expert_ids.values()} == {1}


def test_padding_stays_padding(qwen: nn.Module) -> None:
    """Recorded as empty slots in training, it is routed like stock when replayed, and counts nowhere."""
    swap(qwen, "topk")
    inputs = tiny_inputs(qwen, padding=True)
    qwen.train()
    handle = attach(torch.optim.SGD(qwen.parameters(), lr=0.0), qwen)
    with record(qwen) as tape:
        expected = qwen(**inputs).logits
    padded_BS = inputs["attention_mask"] == 0
    assert all((ids[padded_BS] == 8).all() and (ids[~padded_BS] < 8).all() for (ids,) in tape.expert_ids.values())
    with replay(qwen, tape):
        assert torch.equal(qwen(**inputs).logits, expected)
    handle.remove()


def test_tapes_on_disk(qwen: nn.Module, tmp_path: Path) -> None:
    swap(qwen, "topk")
    with record(qwen) as tape, torch.no_grad():
        qwen(**tiny_inputs(qwen))
        qwen(**tiny_inputs(qwen, length=7))
    tape.save(tmp_path / "tape.safetensors")
    loaded = Tape.load(tmp_path / "tape.safetensors")
    assert same(loaded, tape)
    assert loaded.num_experts == tape.num_experts
    with pytest.raises(TraceError, match=r"no routing trace.*\n.*its schema is 'moerouters\.tape/1'"):
        from moerouters import RoutingTrace

        RoutingTrace.load(tmp_path / "tape.safetensors")


def test_layers_of_our_own() -> None:
    """MoELayer records and replays too; without sequences ids are [T, K]."""
    layer = MoELayer(Router(Gating.softmax(4, 2)), hidden_size=8, expert_size=4)
    x_TD = torch.randn(6, 8)
    with record(layer) as tape:
        first = layer(x_TD)
    assert torch.equal(tape.expert_ids[""][0].long(), first.assignment.expert_ids)
    with replay(layer, tape):
        assert torch.equal(layer(x_TD).hidden, first.hidden)
    with replay(layer, tape), pytest.raises(TraceError, match="routes 5 tokens, and the tape has ids for 6"):
        layer(x_TD[:5])
    with pytest.raises(TraceError, match=r"the passes of layer '' cannot be joined"):
        tape.joined()


def test_models_without_routers_of_ours(qwen: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"has no router of moerouters(.|\n)*swap\(model, 'topk'\)"), record(qwen):
        pass
    swap(qwen, "topk", layers=[0])
    other = model_of("Qwen3MoeTopKRouter")
    swap(other, "topk")
    with record(other) as tape, torch.no_grad():
        other(**tiny_inputs(other))
    with pytest.raises(TraceError, match="recorded from other layers"), replay(qwen, tape):
        pass


def same(left: Tape, right: Tape) -> bool:
    return left.expert_ids.keys() == right.expert_ids.keys() and all(
        torch.equal(a, b)
        for name in left.expert_ids
        for a, b in zip(left.expert_ids[name], right.expert_ids[name], strict=True)
    )
