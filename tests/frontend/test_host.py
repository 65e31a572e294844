"""Tracing samplers into host graphs: the graph gives what the sampler's Python gives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from samplers import Drift, Z, compared, drift_spec, eager, numbers, operators, pipeline
from torch import Tensor, fx, nn

import odsora_compiler as odsora
from odsora_compiler.frontend.host import trace_host
from odsora_compiler.ir.host import random_tensor
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.verify import verify_program

# ------------------------------------------------------------------ samplers of one's own


def euler(c: Any, z: Tensor, steps: int) -> dict[str, Tensor]:
    times = np.linspace(1000, 0, steps + 1)
    for now, then in pairwise(times):
        v = c.drift(z=z, t=torch.full((1,), now, dtype=torch.float32))
        z = z + v * ((now - then) / 1000)
    return {"out": z}


def guided(c: Any, z: Tensor, guidance: Tensor) -> dict[str, Tensor]:
    for step in range(3):
        v = c.drift(z=torch.cat([z, -z]), t=torch.tensor([900.0, 900.0]) / (step + 1))
        one, other = v.chunk(2)
        z += (other + guidance * (one - other)) / 3
    return {"out": z}


def heun(c: Any, z: Tensor) -> dict[str, Tensor]:
    sigmas = torch.linspace(1, 0, 4, dtype=torch.float64)
    for now, then in pairwise(sigmas):
        first = c.drift(z=z, t=1000 * now.float().reshape(1))
        guess = z + first * (now - then)
        if then > 0:
            second = c.drift(z=guess, t=1000 * then.float().reshape(1))
            z = z + 0.5 * (first + second) * (now - then)
        else:
            z = guess
    return {"out": z}


def ddim(c: Any, z: Tensor) -> dict[str, Tensor]:
    alphas = torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000, dtype=torch.float64), 0)
    steps = [999, 600, 200]
    for step, before in zip(steps, [*steps[1:], None], strict=True):
        noise = c.drift(z=z, t=torch.tensor([step]).float())
        alpha = alphas[step]
        earlier = alphas[before] if before is not None else torch.tensor(1.0)
        clean = (z - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        clean = clean.clamp(-2, 2)
        z = earlier.sqrt() * clean + (1 - earlier).sqrt() * noise
    return {"out": z, "clean": clean}


def adams_bashforth(c: Any, z: Tensor) -> dict[str, Tensor]:
    history: list[Tensor] = []
    trajectory = [z]
    for step in range(4):
        history.append(c.drift(z=z, t=torch.tensor([1000.0 - 250 * step])))
        slope = history[-1] if len(history) < 2 else 1.5 * history[-1] - 0.5 * history[-2]
        z = z + slope * 0.25
        trajectory.append(z)
    return {"out": z, "trajectory": torch.stack(trajectory)}


@pytest.mark.parametrize("sampler", [heun, ddim, adams_bashforth])
def test_samplers_give_what_they_give_eagerly(sampler: Callable[..., Any]) -> None:
    compared(sampler, {"z": Z})


def test_loops_unroll_and_numbers_of_the_schedule_become_literals() -> None:
    program = compared(euler, {"z": Z, "steps": 2})
    assert operators(program) == ["full", "call_component", "getitem", "mul", "add"] * 2
    assert [spec.name for spec in program.inputs] == ["z"]
    assert not program.constants
    first = program.calls()[0]
    assert first.args == ("drift", "base")
    assert first.kwargs["t"].args == ([1], 1000.0)  # type: ignore[union-attr]


def test_two_halves_in_one_call() -> None:
    parts = {"drift": drift_spec(batch=2)}
    program = compared(guided, {"z": Z, "guidance": torch.tensor(5.0)}, parts)
    assert len(program.calls()) == 3
    other = {"z": Z, "guidance": torch.tensor(2.0)}
    expected = guided(eager(parts), **{name: value.clone() for name, value in other.items()})
    assert torch.equal(evaluate_program(program, other)["out"], expected["out"])


def test_a_host_may_be_a_method_or_a_lambda() -> None:
    class Sampler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def run(self, c: Any, z: Tensor) -> dict[str, Tensor]:
            return {"out": self.scale * c.drift(z=z, t=torch.ones(1))}

    compared(Sampler(3.0).run, {"z": Z})
    compared(lambda c, z: {"out": c.drift(z=z, t=torch.ones(1))}, {"z": Z})


# ------------------------------------------------------------------ schedulers of diffusers


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "EulerDiscreteScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
    ],
)
def test_schedulers_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")

    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(6)
        z = z * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = (
                scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            )
            noise = c.drift(z=scaled, t=t.reshape(1).float())
            z = scheduler.step(noise, t, z).prev_sample
        return {"out": z}

    compared(sample, {"z": Z})


def test_a_scheduler_that_adds_noise() -> None:
    diffusers = pytest.importorskip("diffusers")

    def sample(c: Any, z: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        scheduler = diffusers.EulerAncestralDiscreteScheduler()
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            noise = c.drift(z=scheduler.scale_model_input(z, t), t=t.reshape(1).float())
            z = scheduler.step(noise, t, z, generator=generator).prev_sample
        return {"out": z}

    program = pipeline(sample, {"z": Z, "generator": None})
    draws = program.host.graph.find_nodes(op="call_function", target=random_tensor)
    assert [node.args for node in draws] == [
        ("normal", [1, 4, 3, 5], torch.float32, seed) for seed in range(len(draws))
    ]
    assert len(draws) >= 3
    # With a generator the numbers are drawn at once, and the same as eagerly.
    own = torch.Generator().manual_seed(4)
    program = pipeline(sample, {"z": Z, "generator": own})
    with torch.no_grad():
        expected = sample(eager({"drift": drift_spec()}), Z, torch.Generator().manual_seed(4))
    assert torch.equal(evaluate_program(program, {"z": Z})["out"], expected["out"])
    assert program.constants


# ------------------------------------------------------------------ what just runs


def test_python_may_branch_on_what_is_known() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        schedule = torch.linspace(1, 0, 5)
        kept = [sigma.item() for sigma in schedule if sigma > 0.3 and bool((schedule < 2).all())]
        assert schedule.numpy()[0] == 1.0
        assert [round(x, 2) for x in schedule.tolist()] == [1, 0.75, 0.5, 0.25, 0]
        for sigma in kept:
            z = z + sigma * c.drift(z=z, t=torch.tensor([sigma]))
        return {"out": z if z.shape[1] == 4 else -z}

    assert len(compared(sample, {"z": Z}).calls()) == 3


def test_values_of_shape_alone_are_known() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        ones = torch.ones_like(z) + z.new_full((1,), 2.0) + torch.zeros_like(z)
        if ones.sum().item() == 3 * z.numel():
            z = z * ones
        return {"out": c.drift(z=z, t=z.new_zeros(1)), "empty": z[:0] * 2}

    program = compared(sample, {"z": Z})
    assert "sum" not in operators(program)


def test_settings_are_bound_and_nested_inputs_are_named_by_their_path() -> None:
    def sample(c: Any, cond: dict[str, Any], mode: str) -> dict[str, Tensor]:
        assert mode == "twice"
        z = cond["pair"][0] * cond["scale"] + cond["pair"][1]
        return {"out": c.drift(z=z, t=torch.ones(1))}

    inputs = {"cond": {"pair": (Z, Z + 1), "scale": 0.5}, "mode": "twice"}
    program = pipeline(sample, inputs)
    assert [spec.name for spec in program.inputs] == ["cond_pair_0", "cond_pair_1"]
    expected = Drift()(Z * 0.5 + (Z + 1), torch.ones(1))
    found = evaluate_program(program, program.examples)["out"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# ------------------------------------------------------------------ constants


def test_a_tensor_of_one_number_is_a_literal_and_any_other_a_constant() -> None:
    weights = numbers(4, 1, 1, seed=3)

    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        z = z * weights + torch.full((5,), 0.25)
        z = torch.where(torch.ones(5, dtype=torch.bool), z, 0.0) * weights.clone()
        return {"out": c.drift(z=z, t=torch.ones(1))}

    program = compared(sample, {"z": Z})
    assert list(program.constants) == ["constant_0"]
    assert torch.equal(program.constants["constant_0"], weights)
    assert len(program.host.graph.find_nodes(op="get_attr", target="constant_0")) == 1
    literals = [
        node.args for node in program.host.operators() if node.target is torch.ops.aten.full.default
    ]
    assert literals == [([5], 0.25), ([5], True), ([], 0.0), ([1], 1.0)]


def test_a_constant_has_the_value_it_had_when_it_was_used() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        row = torch.arange(5.0)
        a = z + row
        row.mul_(10)
        row.numpy()[0] = 7
        return {"a": a, "b": c.drift(z=z + row, t=torch.ones(1))}

    assert len(compared(sample, {"z": Z}).constants) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("zero_dimensional", [True, False])
def test_numbers_in_tensors_promote_as_in_pytorch(
    dtype: torch.dtype, zero_dimensional: bool
) -> None:
    number = torch.tensor(3 if dtype == torch.int64 else 1 / 3, dtype=dtype)
    number = number if zero_dimensional else number.reshape(1)

    def sample(c: Any, z: Tensor, n: Tensor, s: Tensor) -> dict[str, Tensor]:
        c.drift(z=z, t=torch.ones(1))
        results = {}
        for name, x in (("z", z), ("n", n), ("s", s), ("half", z.half())):
            results |= {
                f"{name}_add": x + number,
                f"{name}_sub": x - number,
                f"{name}_rsub": number - x,
                f"{name}_mul": number * x,
                f"{name}_div": x / number,
                f"{name}_rdiv": number / x,
                f"{name}_scaled": torch.add(x, number, alpha=2),
            }
        results["called"] = c.drift(z=z, t=torch.ones(1))
        return results

    compared(sample, {"z": Z, "n": torch.arange(1, 6), "s": torch.tensor(0.7)})


def test_float64_schedules_keep_their_precision() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        sigma = torch.tensor([math.pi], dtype=torch.float64)
        return {"double": z * sigma, "single": z * sigma[0], "v": c.drift(z=z, t=sigma.float())}

    program = compared(sample, {"z": Z})
    assert [spec.dtype for spec in program.outputs] == [
        torch.float64,
        torch.float32,
        torch.float32,
    ]


def test_weights_of_modules_that_a_host_closes_over_are_constants() -> None:
    embedding = nn.Embedding(3, 5)

    def sample(c: Any, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"out": c.drift(z=z + embedding(label), t=torch.ones(1))}

    program = compared(sample, {"z": Z, "label": torch.tensor([2])})
    assert torch.equal(program.constants["constant_0"], embedding.weight)


# ------------------------------------------------------------------ random numbers


def test_every_draw_has_a_seed_of_its_own() -> None:
    def drawn(c: Any, z: Tensor) -> dict[str, Tensor]:
        return {
            "randn": torch.randn(2, 3),
            "like": torch.randn_like(z),
            "rand": torch.rand((3,), dtype=torch.float64),
            "shifted": torch.empty_like(z).normal_(2.0, 3.0),
            "uniform": torch.empty(4).uniform_(-1, 1),
            "around": torch.normal(z, 0.5),
        }

    def expected(z: Tensor) -> dict[str, Tensor]:
        shape = list(z.shape)
        return {
            "randn": random_tensor("normal", [2, 3], torch.float32, 0),
            "like": random_tensor("normal", shape, torch.float32, 1),
            "rand": random_tensor("uniform", [3], torch.float64, 2),
            "shifted": random_tensor("normal", shape, torch.float32, 3) * 3 + 2,
            "uniform": random_tensor("uniform", [4], torch.float32, 4) * 2 - 1,
            "around": random_tensor("normal", shape, torch.float32, 5) * 0.5 + z,
        }

    function, _ = trace_host(drawn, {"z": Z}, {})
    found = fx.Interpreter(fx.GraphModule(nn.Module(), function.graph)).run(Z)
    for name, value, wanted in zip(function.results, found, expected(Z).values(), strict=True):
        assert torch.equal(value, wanted), name


def test_leaving_one_draw_out_does_not_change_the_others() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        first = torch.randn_like(z)
        return {"unused": first, "out": c.drift(z=z + torch.randn_like(z), t=torch.ones(1))}

    both = evaluate_program(pipeline(sample, {"z": Z}), {"z": Z})
    one = pipeline(lambda c, z: {"out": sample(c, z)["out"]}, {"z": Z})
    assert torch.equal(evaluate_program(one, {"z": Z})["out"], both["out"])
    assert operators(one).count("random_tensor") == 1


def test_the_random_state_is_left_alone() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return {"out": c.drift(z=z + torch.randn_like(z), t=torch.ones(1))}

    torch.manual_seed(11)
    before = torch.get_rng_state()
    pipeline(sample, {"z": Z})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_draws_at_once_whatever_meets_its_numbers() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        z = z + torch.randn(z.shape, generator=generator)
        z = z + torch.empty_like(z).normal_(generator=generator)
        order = torch.randperm(5, generator=generator)
        return {"out": c.drift(z=z[..., order], t=torch.ones(1))}

    assert "random_tensor" not in operators(compared(sample, {"z": Z}))


# ------------------------------------------------------------------ components


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean(-1), "values": x * 2}


class Named(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], times: int) -> tuple[Tensor]:
        return ((pair[0] + pair[1]) * times,)


def test_outputs_by_attribute_and_by_key() -> None:
    parts = {"two": odsora.ModelSpec(TwoOutputs(), {"x": Z})}
    compared(lambda c, x: {"out": c.two(x=x).mean + 1}, {"x": Z}, parts)
    # `values` is also a method of dictionaries: such an output has its key.
    program = pipeline(lambda c, x: c["two"](x=x)["values"], {"x": Z}, parts)
    assert torch.equal(evaluate_program(program, {"x": Z})["output"], Z * 2)


def test_nested_inputs_of_a_component_are_given_as_at_capture() -> None:
    parts = {"named": odsora.ModelSpec(Named(), {"pair": (Z, Z), "times": 3})}
    program = pipeline(lambda c, x: c.named(pair=(x, x + 1)), {"x": Z}, parts)
    assert torch.equal(evaluate_program(program, {"x": Z})["output"], (Z + (Z + 1)) * 3)


def test_several_components_and_results_of_one_for_another() -> None:
    parts = {"drift": drift_spec(), "two": odsora.ModelSpec(TwoOutputs(), {"x": Z})}

    def sample(c: Any, x: Tensor) -> dict[str, Tensor]:
        return {"out": c.drift(z=x, t=c.two(x=x).mean.flatten()[:1])}

    program = compared(sample, {"x": Z}, parts)
    assert list(program.components) == ["drift", "two"]
    assert [node.args[0] for node in program.calls()] == ["two", "drift"]


def test_what_nothing_needs_is_not_in_the_graph() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        c.drift(z=z * 2, t=torch.ones(1))
        (z + 3).relu()
        return {"out": c.drift(z=z, t=torch.ones(1))}

    assert operators(pipeline(sample, {"z": Z})) == ["full", "call_component", "getitem"]


# ------------------------------------------------------------------ outputs


def test_names_of_outputs() -> None:
    def named(host: Callable[..., Any]) -> list[str]:
        def called(c: Any, z: Tensor) -> Any:
            return host(c.drift(z=z, t=torch.ones(1)))

        return [spec.name for spec in pipeline(called, {"z": Z}).outputs]

    assert named(lambda v: v) == ["output"]
    assert named(lambda v: {"video": v, "z": v}) == ["video", "output_z"]
    assert named(lambda v: (v, v + 1)) == ["output_0", "output_1"]
    assert named(lambda v: {"a": {"b": v}}) == ["a_b"]


def test_an_output_may_be_an_input_or_a_constant() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        return {"same": z, "fixed": torch.arange(3), "v": c.drift(z=z, t=torch.ones(1))}

    compared(sample, {"z": Z})


# ------------------------------------------------------------------ provenance


def test_nodes_name_the_line_of_the_sampler() -> None:
    program = pipeline(euler, {"z": Z, "steps": 1})
    first = euler.__code__.co_firstlineno
    places = {
        node.name: node.meta["provenance"].source
        for node in program.host.graph.nodes
        if node.op == "call_function"
    }
    assert places["full"] == f"test_host.py:{first + 3} in euler"
    assert places["call_component"] == f"test_host.py:{first + 3} in euler"
    assert places["mul"] == f"test_host.py:{first + 4} in euler"


# ------------------------------------------------------------------ writing in place


def test_in_place_arithmetic() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        same = z
        z += 1
        z.mul_(torch.tensor(2.0, dtype=torch.float64)).clamp_(-3, 3)
        z[z.new_zeros(1).long()] -= 0.5
        torch.add(z, 1, out=z)
        double = z.double()
        z.add_(double)  # computed in float64, kept in float32
        return {"same": same, "z": c.drift(z=z, t=torch.ones(1)), "double": double}

    compared(lambda c, x: sample(c, x), {"x": Z})


def test_buffers_filled_step_by_step() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        path = torch.zeros(3, *z.shape)
        norms = torch.empty(2, dtype=torch.float64)
        path[0] = z
        for step in range(2):
            path[step + 1] = path[step] + c.drift(z=path[step], t=torch.ones(1))
            norms[step] = path[step + 1].norm()
        latest = path[-1]
        path[:, :, 1:3, ::2] *= -1
        return {"path": path, "norms": norms, "latest": latest}

    program = compared(sample, {"z": Z})
    assert {"select_scatter", "slice_scatter"} <= set(operators(program))
    assert "index_put" not in operators(program)


def test_writes_show_in_every_view_of_the_memory() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        flat, turned, alias = z.view(-1), z.transpose(1, 3), z.detach()
        turned[:, 0] = 5
        flat[7:9] += flat[:2]
        z.unsqueeze_(0)
        z.squeeze_()
        z[1:].copy_(torch.zeros(1))
        diagonal = z[0].diagonal()
        diagonal.mul_(3)
        v = c.drift(z=z[None], t=torch.ones(1))
        return {"flat": flat, "turned": turned, "alias": alias, "new": z, "v": v}

    compared(lambda c, x: sample(c, x), {"x": Z})


def test_operators_on_lists_of_tensors() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        pair = [z * 1, c.drift(z=z, t=torch.ones(1))]
        torch._foreach_add_(pair, 1.0)
        return {"one": pair[0], "other": torch._foreach_mul(pair, 2.0)[1]}

    compared(sample, {"z": Z})


def test_an_operator_of_strides_is_taken_by_its_elements() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        windows = z.view(-1).as_strided((5, 4), (3, 1))
        kept = windows * 2
        z.view(-1).as_strided((3, 2), (8, 2), 1).zero_()
        return {"windows": windows, "kept": kept, "v": c.drift(z=z, t=torch.ones(1))}

    program = compared(lambda c, x: sample(c, x), {"x": Z})
    assert "as_strided" not in operators(program)


def test_random_views_and_writes() -> None:
    """Programs of random views and writes, on traced and on real tensors."""
    count = 0
    for seed in range(80):
        print("seed", seed)
        host = _random_program(seed)
        inputs = {"a": numbers(2, 3, 4, seed=seed), "b": numbers(6, 4, seed=seed + 1)}
        try:
            expected = host(None, **{name: value.clone() for name, value in inputs.items()})
        except RuntimeError:
            continue  # PyTorch refuses such a write
        function, constants = trace_host(host, inputs, {})
        program = odsora.Program("views", {}, function, inputs, constants=constants)
        verify_program(program)
        found = evaluate_program(program, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
            )
        count += 1
    assert count > 70


def _random_program(seed: int) -> Callable[..., dict[str, Tensor]]:
    def host(c: Any, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        r = random.Random(seed)
        pool = [a, b, torch.arange(24.0).reshape(2, 3, 4) * 0.1, torch.zeros(4, 6), a * 2]
        for _ in range(r.randint(3, 12)):
            x, y = r.choice(pool), r.choice(pool)
            kind = r.randrange(8)
            if kind < 4:
                for _ in range(r.randint(1, 3)):
                    x = _random_view(r, x)
                pool.append(x)
            elif kind == 4:
                x.mul_(r.choice([0.5, 2.0, torch.tensor(1.5)]))
            elif kind == 5:
                x.add_(y.sum() if r.random() < 0.7 else x)
            elif kind == 6:
                x.copy_(y if y.shape == x.shape else y.sum())
            else:
                pool.append(x * 1.25 + y.mean())
            if r.random() < 0.15:
                torch.add(x, 1, out=x) if r.random() < 0.5 else x.zero_()
        return {f"o{index}": value for index, value in enumerate(pool)}

    return host


def _random_view(r: random.Random, x: Tensor) -> Tensor:
    kind, d = r.randrange(9), r.randrange(max(x.dim(), 1))
    if kind == 0 and x.dim() and x.shape[d]:
        return x.select(d, r.randrange(x.shape[d]))
    if kind == 1 and x.dim():
        first = r.randint(0, max(x.shape[d] - 1, 0))
        last = r.randint(first, x.shape[d])
        return x[(slice(None),) * d + (slice(first, last, r.choice([1, 1, 2])),)]
    if kind == 2 and x.dim():
        return x.transpose(d, r.randrange(x.dim()))
    if kind == 3:
        return x.unsqueeze(r.randint(0, x.dim()))
    if kind == 4:
        return x.squeeze()
    if kind == 5 and x.is_contiguous():
        return x.view(-1)
    if kind == 6 and x.dim() and x.shape[-1] % 2 == 0 and x.is_contiguous():
        return x.unflatten(-1, (-1, 2)) if x.numel() else x
    if kind == 7 and x.dim():
        return x.permute(*r.sample(range(x.dim()), x.dim()))
    if kind == 8 and x.dim() > 1:
        return x.diagonal(0, -2, -1)
    return x
