"""The paper's models with the paper's hyperparameters on the paper's machines, on paper."""

import pytest

pytest.importorskip("tyro", reason="the command needs tyro")
from plans import really_sharded

from coterie.models.params import count_params
from coterie.parallel.layout import Layout
from coterie.train.config import check
from coterie.train.machines import MACHINES, machine
from coterie.train.plan import plan, run_of
from coterie.train.plan_memory import memory
from coterie.train.plan_table import torchrun_line
from coterie.train.pretrain import parse
from coterie.train.recipes import RECIPES

# DeepSpeed-MoE's released scripts: batch, peak and final rate, tokens of decay, deviation of initial weights,
# and GPUs: the scripts say 64, the paper's throughput table and the 1.3B student 128.
PUBLISHED = {
    "125m_moe64": (256, 4.5e-4, 4.5e-6, 300e9, 0.014, 64),
    "350m_dense": (256, 3.0e-4, 3.0e-5, 260e9, 0.014, 64),
    "350m_moe128": (256, 2.0e-4, 2.0e-6, 300e9, 0.014, 64),
    "350m_prmoe": (256, 3.0e-4, 1.0e-6, 300e9, 0.014, 64),
    "350m_mos": (256, 3.0e-4, 1.0e-6, 300e9, 0.014, 64),
    "1.3b_dense": (512, 2.0e-4, 2.0e-5, 260e9, 0.014, 64),
    "1.3b_moe128": (512, 1.2e-4, 1.0e-6, 300e9, 0.014, 128),
    "1.3b_prmoe": (512, 1.2e-4, 1.0e-6, 300e9, 0.014, 128),
    "1.3b_mos": (512, 1.2e-4, 1.0e-6, 300e9, 0.014, 128),
    "6.7b_dense": (1024, 1.2e-4, 1.2e-5, 260e9, 0.01, 128),
}
# Models that the paper serves and does not train (its table 6): published billions, ours, and where a plan puts them.
SERVED = {
    "1.3b_moe128": (52.0, 52.47, 128, "a100-40"),
    "2.4b_moe128": (107.7, 107.08, 128, "a100-40"),
    "8b_moe128": (349.0, 349.24, 256, "a100-80"),
    "24b_moe128": (1064.9, 1047.42, 512, "a100-80"),
    "47b_moe128": (2024.0, 2024.62, 1024, "a100-80"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_runs(name: str) -> None:
    batch, lr, min_lr, decay, std, gpus = PUBLISHED[name]
    config = RECIPES[name]()
    optim, gate = config.optim, config.model.moe.gate
    assert (config.batch_size, config.seq_len, config.tokens) == (batch, 2048, 300e9)
    assert (optim.lr, optim.min_lr, optim.decay_tokens, optim.warmup_tokens) == (lr, min_lr, decay, 375e6)
    assert (optim.schedule, optim.beta1, optim.beta2, optim.weight_decay, optim.clip) == ("cosine", 0.9, 0.95, 0.1, 1)
    assert config.model.init_std == std
    if config.model.experts:
        assert (gate.aux_weight, gate.capacity_factor, gate.eval_capacity_factor) == (0.01, 1.0, 1.0)
        assert (config.model.moe.top_k, gate.min_capacity, gate.drop_policy) == (1, 4, "random")
    check(config, gpus)


@pytest.mark.parametrize("name", [*PUBLISHED, *(name for name in SERVED if name not in PUBLISHED)])
def test_every_recipe_is_cut_over_its_ranks(name: str) -> None:
    """`parallelize` itself on the meta device, on as many ranks that move nothing: equal to the plan but for vectors
    whose shards are rounded up otherwise; and the plan's fits."""
    config = RECIPES[name]()
    gpus, gpu = (PUBLISHED[name][-1], "a100-40") if name in PUBLISHED else SERVED[name][2:]
    layout = Layout(1, gpus, ep=config.parallel.ep)
    needed = memory(config.model, layout, run_of(config, layout, MACHINES[gpu]))
    assert 4 * really_sharded(config.model, layout) == pytest.approx(needed.parameters, rel=1e-3)
    assert needed.peak <= MACHINES[gpu].usable * MACHINES[gpu].memory


@pytest.mark.parametrize("name", SERVED)
def test_the_largest_models_fit_the_papers_machines(name: str) -> None:
    published, ours, gpus, gpu = SERVED[name]
    config = RECIPES[name]()
    total = count_params(config.model).total / 1e9
    assert f"{total:.2f}" == f"{ours:.2f}"
    assert total == pytest.approx(published, rel=0.02)
    found = plan(config, gpus, machine(gpu), 8, {"dp_replicate": 1, "etp": 1})
    assert found.rows[0].memory.peak <= 0.9 * MACHINES[gpu].memory
    _accepted(name, torchrun_line(name, found.rows[0], 8), gpus)


def test_a_trillion_on_ten_thousand() -> None:
    """10,000 is 16 * 625: 128 experts lie on 16 ranks at most, which 625 ranks cannot share evenly. 10,240 can."""
    steps = []
    for gpus, tp in [(10_000, 4), (10_240, 1)]:
        words = ["24b_moe128", "--batch-size", str(gpus)]
        config = parse(words)
        assert config is not None
        best = plan(config, gpus, machine("a100-80"), 8, {"tp": tp}).rows[0]
        steps.append(best.step.total)
        _accepted("24b_moe128", torchrun_line("24b_moe128", best, 8, words[1:]), gpus)
    assert steps[1] < steps[0] / 10


def _accepted(name: str, line: str, world: int) -> None:
    """The run's own parser and its own checks take the command."""
    parsed = parse(line.partition(" -m coterie.train.pretrain ")[2].split())
    assert parsed is not None
    assert parsed.model == RECIPES[name]().model
    check(parsed, world)
