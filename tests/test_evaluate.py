"""Perplexity and KL against hand numbers, a uniform model, and a loop over the models' own logits."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_sparsity.errors import ConfigError, NumericsError, ShapeError
from elastic_sparsity.evaluate import KeptHidden, evaluate
from elastic_sparsity.tiny import tiny_model

VOCABULARY = 260


class Bigram(nn.Module):
    """A causal LM that is a table of next-token probabilities."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.device = torch.device("cpu")
        self.head = nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = torch.tensor(table).log().T.contiguous()

    def base_model(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=F.one_hot(ids, self.head.in_features).float())

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def windows(count: int = 2, length: int = 140) -> Tensor:
    """Longer than one slice of logits, and no multiple of it."""
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def naive(model: nn.Module, ids: Tensor, reference: nn.Module | None = None) -> tuple[float, float | None]:
    """(perplexity, KL) from whole logits, window by window, in float64."""
    nll = kl = 0.0
    with torch.no_grad():
        for window in ids:
            log_p = model(window[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            nll += float(F.cross_entropy(log_p, window[1:], reduction="sum"))
            if reference is not None:
                log_q = reference(window[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
                kl += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return math.exp(nll / tokens), None if reference is None else kl / tokens


def test_a_bigram_by_hand():
    """The window 0 1 1 0 has probabilities 1/2, 3/4 and 1/4 under the model, 1/2 each under the reference."""
    model, reference = Bigram([[0.5, 0.5], [0.25, 0.75]]), Bigram([[0.5, 0.5], [0.5, 0.5]])
    found = evaluate({"m": model}, torch.tensor([[0, 1, 1, 0]]), reference=reference, autocast=nullcontext)["m"]
    assert found.perplexity == pytest.approx((1 / 2 * 3 / 4 * 1 / 4) ** (-1 / 3), rel=1e-6)
    # Positions 0, 1, 2 hold tokens 0, 1, 1: KL 0 once, then 1/2 log 2 + 1/2 log 2/3 twice.
    assert found.kl == pytest.approx(2 / 3 * 0.5 * (math.log(2) + math.log(2 / 3)), rel=1e-6)
    assert found.num_tokens == 3


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    found = evaluate({"uniform": model}, windows(), autocast=nullcontext)["uniform"]
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.kl is None
    assert found.num_tokens == 2 * 139


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-350m", "gpt2"])
def test_equals_a_loop_over_the_models_logits(family):
    models = {"base": tiny_model(family), "other": tiny_model(family, seed=1)}
    found = evaluate(models, windows(), reference=models["base"], autocast=nullcontext)
    assert list(found) == ["base", "other"]
    for name, model in models.items():
        perplexity, kl = naive(model, windows(), models["base"])
        assert found[name].perplexity == pytest.approx(perplexity, rel=1e-5)
        assert found[name].kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert abs(found["base"].kl) < 1e-6  # float32 rounding of two ways to a log-softmax
    assert found["other"].kl > 1e-4


def test_windows_are_independent_of_each_other_and_of_other_models():
    model, ids, seen = tiny_model("llama"), windows(3, 20), []
    together = evaluate(
        {"a": model, "b": tiny_model("llama", seed=1)},
        ids,
        autocast=nullcontext,
        on_window=lambda *progress: seen.append(progress),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    alone = [evaluate({"a": model}, window[None], autocast=nullcontext)["a"].perplexity for window in ids]
    mean = math.exp(sum(map(math.log, alone)) / 3)
    assert together["a"].perplexity == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["32", "16"])
@pytest.mark.parametrize("kept_windows", [3, 1, 0])
def test_a_kept_reference_changes_no_figure_and_runs_once_a_window(kept_windows, autocast):
    reference, ids = tiny_model("llama"), windows(3)
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    one_window = 139 * reference.config.hidden_size * 4
    kept = KeptHidden(reference, kept_windows * one_window + one_window // 2)
    runs = []
    reference.base_model.register_forward_hook(lambda *_: runs.append(1))
    options = {"reference": reference, "autocast": autocast}
    found = [evaluate({"it": model}, ids, reference_hidden=kept, **options) for model in models]
    assert len(runs) == 3 + (3 - kept_windows)
    assert kept.free_bytes == one_window // 2
    assert found == [evaluate({"it": model}, ids, **options) for model in models]
    assert len({x["it"].kl for x in found}) == 2


def test_hidden_states_without_their_model_are_refused():
    kept = KeptHidden(tiny_model("llama"))
    with pytest.raises(ConfigError, match="reference_hidden without reference"):
        evaluate({"it": tiny_model("llama")}, windows(), reference_hidden=kept, autocast=nullcontext)


def test_bfloat16_autocast_is_close_to_float32():
    model = tiny_model("llama")
    found = evaluate({"m": model}, windows(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))["m"]
    assert found.perplexity == pytest.approx(naive(model, windows())[0], rel=0.02)
    assert model.lm_head.weight.dtype == torch.float32


def test_a_loss_that_is_not_finite_names_the_models():
    good, bad = tiny_model("llama"), tiny_model("llama", seed=1)
    bad.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"^evaluation: the loss of bad, worse is not finite\.$"):
        evaluate({"good": good, "bad": bad, "worse": bad}, windows(1, 8), autocast=nullcontext)


def test_a_reference_that_is_not_finite_is_refused():
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    reference.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        evaluate({"m": model}, windows(1, 8), reference=reference, autocast=nullcontext)


def test_a_reference_of_another_vocabulary():
    model, reference = tiny_model("llama"), tiny_model("llama", vocab_size=300)
    with pytest.raises(ShapeError, match=r"evaluation: vocabulary 260 against the reference's 300\."):
        evaluate({"m": model}, windows(1, 8), reference=reference, autocast=nullcontext)
