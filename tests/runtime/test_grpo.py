"""The compiled policy step is TRL's: losses, gradients and metrics on the same completions; and what is refused."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from tests.runtime.test_replan import short_of_memory
from tests.runtime.test_trainer import EAGER, adapted
from unsloth.models.adapters import add_lora
from unsloth.models.byte_tokenizer import byte_tokenizer
from unsloth.models.presets import build
from unsloth.runtime.grpo import GRPOTrainer
from unsloth.runtime.packed_policy import pack, unlike
from unsloth.runtime.policy_batch import trimmed
from unsloth.runtime.policy_loss import LOSSES, PolicyLoss, Sampled, policy_loss, settings_of
from unsloth.runtime.problems import DataError
from unsloth.runtime.rewards import RewardError


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def rows(count: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": f"What is {i} + {i * i}? ", "answer": i + i * i} for i in range(count)])


def shortness(completions: list[str], **_: Any) -> list[float]:
    return [1 / (1 + len(text)) + 0.1 * (i % 3) for i, text in enumerate(completions)]


def scripted(made: Any) -> Any:
    """Completions that depend on nothing but the turn: of several lengths, some of which do not end."""
    turns = itertools.count()

    def generate(prompt_ids: Any, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        turn = next(turns)
        lengths = [2 + (5 * i + 3 * turn) % 7 for i in range(len(prompt_ids))]
        ends = made.processing_class.eos_token_id
        return [
            [(7 * i + 11 * j + turn) % 200 + 4 for j in range(n)] + [ends] * (i % 4 > 0) for i, n in enumerate(lengths)
        ], None

    made._generate_single_turn = generate
    return made


def make(
    cls: Any,
    folder: Any,
    more: Any = None,
    *,
    model: Any = None,
    reward: Any = shortness,
    data: Any = None,
    **changes: Any,
) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    made = cls(
        adapted() if model is None else model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings),
        train_dataset=rows() if data is None else data,
        processing_class=byte_tokenizer(),
        **(more or {}),
    )
    return scripted(made)


# -- one step ----------------------------------------------------------------------------------------------------------


def batch(seed: int = 0, count: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    """Completions sampled long ago by another policy, with everything that a loss may look at; two of one prompt."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths, prompts = torch.tensor([tokens, 4, 1]), torch.tensor([3, 3, 5])
    spread = torch.arange(tokens)
    log_p = -5.5 + 0.4 * normal(count, tokens)  # about as likely as by chance
    mask = (spread < lengths[:, None]).long()
    prompt_ids = torch.randint(4, 250, (count, 5), generator=generator)
    prompt_ids[1, 2:] = prompt_ids[0, 2:]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (torch.arange(5) >= 5 - prompts[:, None]).long(),
        "completion_ids": torch.randint(4, 250, (count, tokens), generator=generator),
        "completion_mask": mask,
        "tool_mask": (spread != 2).long().expand(count, tokens).clone(),
        "advantages": torch.tensor([1.3, -0.7, 0.4]),
        "num_items_in_batch": torch.tensor(31),
        "old_per_token_logps": log_p,
        "ref_per_token_logps": log_p + 0.3 * normal(count, tokens),
        "sampling_per_token_logps": log_p + 0.1 * normal(count, tokens),
        "importance_sampling_ratio": torch.exp(0.1 * normal(count, tokens)),
    }


def step(made: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, gradients by parameter and metrics."""
    made.model.train()
    made.model.zero_grad()
    made.current_gradient_accumulation_steps = 2
    made._metrics["train"].clear()
    loss = made._compute_loss(made.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    metrics = {name: float(values[-1]) for name, values in made._metrics["train"].items()}
    return {"loss": loss.detach(), "gradients": gradients, "metrics": metrics}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=tolerance, atol=1e-6)
    assert ours["gradients"].keys() == theirs["gradients"].keys() and ours["gradients"]
    for name, gradient in theirs["gradients"].items():
        error = (ours["gradients"][name] - gradient).norm()
        assert gradient.norm() > 0 and error <= tolerance * gradient.norm(), (name, error / gradient.norm())
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=1e-6, nan_ok=True)


def configure(made: Any, **settings: Any) -> None:
    """As if it had been built with them."""
    for name, value in settings.items():
        setattr(made.args, name, value)
        if hasattr(made, name):
            setattr(made, name, value)
    made._entropy_bonus_enabled = made.entropy_coef != 0.0
    if isinstance(made, GRPOTrainer):
        made._loss = settings_of(made)


@pytest.fixture(scope="module", params=["lora", "full", "padded"])
def both(request: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, on equal models; both believe that an engine has sampled, which rounds otherwise."""
    made = []
    settings = {"compile": False, "shared_prompts": request.param != "padded"}
    for cls, more in ((trl.GRPOTrainer, {}), (GRPOTrainer, settings)):
        if request.param == "full":
            torch.manual_seed(0)
            model = build("tiny-llama")
        else:
            model = adapted()
        made.append(make(cls, tmp_path_factory.mktemp("grpo"), more, model=model, temperature=0.8))
        made[-1].use_vllm = made[-1].vllm_importance_sampling_correction = True
    return made[0], made[1]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True},
    "everything": {"beta": 0.2, "delta": 1.1, "off_policy_mask_threshold": 0.02, "entropy_coef": 0.3},
}
PLAIN = {
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "epsilon_low": 0.1,
    "epsilon_high": 0.15,
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_loss_and_gradient_is_that_of_trl(
    both: tuple[Any, Any], loss_type: str, settings: dict[str, Any]
) -> None:
    inputs = batch()
    if not settings:
        inputs = {n: x for n, x in inputs.items() if n not in ("tool_mask", "old_per_token_logps")}
    for made in both:
        configure(made, **{**PLAIN, **settings, "loss_type": loss_type})
    theirs, ours = (step(made, inputs) for made in both)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["tiny-mistral", "tiny-qwen3", "tiny-phi3"])
def test_a_prompt_stands_once_for_all_that_complete_it(tmp_path, kind: str) -> None:
    """Longer than the window of the first of these models; one graph, compiled, for rows of any length."""
    theirs, ours = (
        make(cls, tmp_path, more, model=_copies(kind), max_completion_length=30)
        for cls, more in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"options": EAGER}))
    )
    for seed, tokens in ((0, 30), (1, 17)):
        inputs = {n: x for n, x in batch(seed, tokens=tokens).items() if n not in LATER}
        assert_same(step(ours, inputs), step(theirs, inputs))
    assert ours._pads is None
    (graph,) = ours.explanation.graphs
    assert heads(graph) == ["plain, with statistics, per token"]


def _copies(kind: str) -> Any:
    torch.manual_seed(0)
    return build(kind)


LATER = {"old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"}


def test_logits_of_a_float32_head(tmp_path) -> None:
    """TRL's ``cast_lm_head_to_fp32``: the head is still one operator, and completions still a row."""
    found = []
    for cls, more in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"options": EAGER})):
        model = build("tiny-llama", dtype=torch.bfloat16)
        made = make(cls, tmp_path, more, model=model, cast_lm_head_to_fp32=True)
        found.append(step(made, {n: x for n, x in batch().items() if n not in LATER}))
    theirs, ours = found
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)
    for name, gradient in theirs["gradients"].items():
        error = (ours["gradients"][name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 0.05, (name, error)  # two orders of rounding to bfloat16
    (graph,) = made.explanation.graphs
    assert heads(graph) == ["plain, with statistics, per token"] and made._pads is None


def test_a_row_has_every_token_once() -> None:
    inputs = batch()
    inputs["completion_mask"][1] = 0  # cut off, say
    packed = pack(inputs)
    assert packed is not None
    prompts, completed = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
    parts = (inputs["prompt_ids"], prompts), (inputs["completion_ids"], completed)
    wanted = [ids[i][mask[i]] for i in (0, 2) for ids, mask in parts]
    assert torch.equal(packed.row[0], torch.cat(wanted))
    assert packed.row[1].tolist() == [*range(3 + 7), *range(5 + 1)]
    assert torch.equal(packed.row[0][packed.documents[0]], packed.row[0])  # no prompt stands for two

    shared = pack(batch())
    assert shared is not None
    ids, spread = shared.row[0], shared.documents[0]
    assert len(ids) == 3 + 7 + 4 + 5 + 1 and len(spread) == len(ids) + 3
    assert torch.equal(ids[spread][[0, 1, 2]], ids[spread][[10, 11, 12]])
    assert torch.equal(ids[spread][shared.row[2]], ids)
    assert torch.equal(F.pad(shared.scored[1], (0, 1), value=-1)[shared.slots] >= 0, batch()["completion_mask"].bool())
    inputs["completion_mask"][:] = 0
    assert pack(inputs) is None


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("tiny-gemma2", {}, "a mask, a cap or sinks"),
        ("tiny-llama", {"attention_dropout": 0.1}, "drops 10%"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "are dynamic"),
    ],
)
def test_models_that_cannot_be_run_as_a_row_are_padded(tmp_path, caplog, kind, sizes, why) -> None:
    model = build(kind)
    for name, value in sizes.items():
        setattr(model.config, name, value)
    ours = make(GRPOTrainer, tmp_path, {"compile": False}, model=model)
    with caplog.at_level(logging.WARNING):
        step(ours, {n: x for n, x in batch().items() if n not in LATER})
    assert why in str(ours._pads) and "padded to each other" in caplog.text


def test_a_model_that_is_another_as_a_row_is_noticed(monkeypatch: Any) -> None:
    model = build("tiny-llama")
    assert unlike(model) is None and model.config._attn_implementation == "sdpa" and model.training
    norm = type(model.model.norm)
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x + x.roll(1, 1)))  # tokens side by side mix
    assert "other logits" in str(unlike(model))


def test_a_loss_that_is_not_known() -> None:
    x = torch.zeros(1, 2)
    for settings, what in ((PolicyLoss("ppo"), "loss_type 'ppo'"), (PolicyLoss("grpo", "word"), "level 'word'")):
        with pytest.raises(ValueError, match=what):
            policy_loss(x, x, Sampled(x[:, :1], torch.ones(1, 2)), settings)


def test_trls_own_loss_on_compiled_log_probabilities(tmp_path) -> None:
    """A quantile of the entropies is not known here."""
    settings = {"top_entropy_quantile": 0.5, "beta": 0.1, "entropy_coef": 0.2}
    theirs = make(trl.GRPOTrainer, tmp_path, **settings)
    ours = make(GRPOTrainer, tmp_path, {"options": EAGER}, **settings)
    assert ours._loss is None
    assert_same(step(ours, batch()), step(theirs, batch()))
    (graph,) = ours.explanation.graphs
    assert heads(graph) == ["plain, with statistics, per token"]


def heads(graph: Any) -> list[str]:
    """What a graph's losses were recognised as."""
    sites = [site for report in graph.passes for site in report.rewritten]
    return [site.detail for site in sites if site.operator == "linear_cross_entropy"]


# -- a run -------------------------------------------------------------------------------------------------------------

NAMES = ("loss", "grad_norm", "reward", "entropy", "kl", "clip_ratio/region_mean", "clip_ratio/low_min", "num_tokens")


def history(made: Any) -> list[dict[str, float]]:
    made.train()
    return [{n: float(h[n]) for n in NAMES if n in h} for h in made.state.log_history if "loss" in h]


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"num_iterations": 2, "loss_type": "grpo"}], ids=["kl", "twice"])
def test_a_run_is_that_of_trl_in_two_graphs(tmp_path, settings) -> None:
    settings = {**settings, "temperature": 0.9, "optim": "sgd", "max_steps": 2 * settings.get("num_iterations", 1)}
    wanted = history(make(trl.GRPOTrainer, tmp_path, **settings))
    made = make(GRPOTrainer, tmp_path, {"options": EAGER}, **settings)
    found = history(made)
    assert len(found) == len(wanted) > 1 and all(entry["grad_norm"] > 0 for entry in found)
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    graphs = made.explanation.graphs
    assert len(graphs) == 2 and not torch._dynamo.utils.counters["graph_break"]
    for graph in graphs:
        assert heads(graph) == ["plain, with statistics, per token"]
        names = {site.operator for report in graph.passes for site in report.rewritten}
        assert {"rms_norm", "rope", "lora_linear"} <= names


def test_a_smaller_plan_is_tried_with_the_same_completions(tmp_path, monkeypatch, caplog) -> None:
    """The step's earlier micro-batch is done again; nothing is generated or logged twice."""

    def everything(made: Any) -> list[dict[str, float]]:
        made.train()
        leave = {"tokens_per_second", "total_flos", "step_time"}
        return [{n: v for n, v in h.items() if n not in leave} for h in made.state.log_history if "loss" in h]

    before = everything(make(GRPOTrainer, tmp_path / "whole", {"compile": False}, optim="sgd"))
    budgets = short_of_memory(monkeypatch)
    made = make(GRPOTrainer, tmp_path / "short", {"options": EAGER}, optim="sgd")
    found, generate = [], made._generate_single_turn
    made._generate_single_turn = lambda *args, **more: found.append(1) or generate(*args, **more)
    with caplog.at_level(logging.WARNING):
        again = everything(made)
    assert len(budgets) == 3 and caplog.text.count("planned again for") == 2 and len(found) == 3
    assert len(again) == len(before) == 3
    for mine, other in zip(again, before, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_without_a_reference_and_an_old_policy_there_is_one_graph(tmp_path) -> None:
    """β = 0 and an update right after each generation: a step is one forward pass; alone in a batch, without a mask."""
    made = make(
        GRPOTrainer,
        tmp_path,
        {"options": EAGER},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
    )
    assert list(made.model.peft_config) == ["default"]
    passes: list[Any] = []
    forward = made._score
    made._score = lambda *args: passes.append(args) or forward(*args)
    found = history(made)
    assert len(found) == 2 and all(entry["grad_norm"] > 0 for entry in found) and not passes
    (graph,) = made.explanation.graphs
    variants = [site.detail for report in graph.passes for site in report.rewritten if site.operator == "attention"]
    assert variants == ["causal"] * 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_reference_of_fresh_adapters_is_the_model_without_them(tmp_path) -> None:
    made = make(
        GRPOTrainer, tmp_path, {"compile": False}, model=add_lora(build("tiny-llama"), rank=4), beta=0.1, optim="sgd"
    )
    theirs = make(trl.GRPOTrainer, tmp_path, model=add_lora(build("tiny-llama"), rank=4), beta=0.1, optim="sgd")
    assert list(made.model.peft_config) == ["default"] and list(theirs.model.peft_config) == ["default", "ref"]
    for mine, other in zip(history(made), history(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_evaluation_is_that_of_trl(tmp_path) -> None:
    settings = {"eval_dataset": rows(4)}
    theirs = make(trl.GRPOTrainer, tmp_path, settings, per_device_eval_batch_size=4)
    ours = make(GRPOTrainer, tmp_path, {**settings, "compile": False}, per_device_eval_batch_size=4)
    wanted, found = theirs.evaluate(), ours.evaluate()
    for name in ("eval_loss", "eval_reward", "eval_entropy", "eval_completions/mean_length"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_columns_without_a_token_are_left_out() -> None:
    inputs = batch()
    inputs["prompt_mask"][:, :2] = 0
    inputs["completion_mask"][:, 4:] = 0
    cut = trimmed(inputs)
    assert cut["prompt_ids"].shape == (3, 3) and torch.equal(cut["prompt_ids"], inputs["prompt_ids"][:, 2:])
    assert cut["old_per_token_logps"].shape == cut["tool_mask"].shape == (3, 4)
    assert cut["advantages"] is inputs["advantages"]
    inputs["completion_mask"].zero_()  # all of them truncated, and masked for it
    assert trimmed(inputs)["completion_ids"].shape == (3, 1)


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_run_resumed_between_two_updates_of_a_generation_is_the_uninterrupted_one(tmp_path, stopped_after) -> None:
    """Real generation, a new one every second update: after one, its second half is still to come."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "steps_per_generation": 4,
        "temperature": 2.0,
    }
    settings |= {"max_completion_length": 5, "beta": 0.1}
    runs = []
    for place in (None, tmp_path / f"checkpoint-{stopped_after}"):
        made = make(GRPOTrainer, tmp_path, {"compile": False}, **settings)
        del made._generate_single_turn  # what the class has
        made.train(resume_from_checkpoint=None if place is None else str(place))
        runs.append(made)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)
    names = ("loss", "grad_norm", "kl", "entropy")
    logs = [[[e[n] for n in names] for e in run.state.log_history if "loss" in e] for run in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 4


# -- heads -------------------------------------------------------------------------------------------------------------


def test_an_adapter_on_the_head_is_refused_and_a_trained_copy_is_not(tmp_path) -> None:
    model = build("tiny-llama")
    with pytest.raises(ValueError, match="lm_head"):
        make(GRPOTrainer, tmp_path, model=add_lora(model, rank=4, target_modules=["q_proj", "lm_head"]))
    inputs = {name: x for name, x in batch().items() if name != "importance_sampling_ratio"}
    found = []
    for cls, more in ((GRPOTrainer, {"options": EAGER}), (trl.GRPOTrainer, {})):
        copied = add_lora(build("tiny-llama"), rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            for name, parameter in copied.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        found.append(step(make(cls, tmp_path, more, model=copied), inputs))
    head = [g for name, g in found[0]["gradients"].items() if "lm_head" in name]
    assert len(head) == 1 and head[0].norm() > 0
    assert_same(*found)


# -- what is wrong with rewards and prompts ----------------------------------------------------------------------------


def raising(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    return [1.0 / (value - 2) for value in answer]  # the second prompt's


def test_mistakes_of_reward_functions_are_named(tmp_path) -> None:
    def wrong(what: Any) -> Any:
        def judge(completions: list[str], **_: Any) -> Any:
            return what(completions)

        return judge

    cases = {
        "returned 3 rewards for 8 completions": wrong(lambda c: [1.0] * 3),
        "returned nan for sample 5 of 8 (prompt 'What is": wrong(lambda c: [0.0] * 5 + [float("nan")] * 3),
        "returned 'good', which is no number, for sample 0": wrong(lambda c: ["good"] * len(c)),
        "returned float, not a list of 8 rewards": wrong(lambda c: 1.0),
        "returned None for sample 2 of 8": wrong(lambda c: [1.0, 1.0] + [None] * 6),
        "raised ZeroDivisionError: float division by zero for sample": raising,
    }
    made = make(GRPOTrainer, tmp_path, {"compile": False}, shuffle_dataset=False)
    from unsloth.runtime.rewards import checked

    for said, function in cases.items():
        made.reward_funcs, made.reward_func_names = [checked(function, "judge", "raise")], ["judge"]
        with pytest.raises(RewardError) as error:
            made.train()
        assert f"reward function judge {said}" in str(error.value), str(error.value)
        made._step, made._buffered_inputs = 0, None


def test_completions_without_a_reward_are_left_out_when_asked(tmp_path, caplog) -> None:
    made = make(
        GRPOTrainer, tmp_path, {"compile": False, "reward_errors": "skip"}, reward=raising, shuffle_dataset=False
    )
    with caplog.at_level(logging.WARNING):
        found = history(made)
    assert len(found) == 3 and any("judge it (4 of 8)" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match="reward_errors cannot be 'ignore'"):
        GRPOTrainer(None, reward_errors="ignore")


def test_a_prompt_that_fills_the_context_is_refused_with_its_row(tmp_path) -> None:
    data = Dataset.from_list([{"prompt": "short", "answer": 1}] * 3 + [{"prompt": "x" * 2100, "answer": 1}])
    with pytest.raises(DataError, match=r"row 3: its prompt has 210\d tokens, and the model's context is 2048"):
        make(GRPOTrainer, tmp_path, model=add_lora(build("tiny-llama"), rank=4), data=data)
