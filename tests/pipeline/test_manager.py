"""The pass manager: conditions, what passes declare and what they do, instruments, analyses."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from recording_passes import (
    Net,
    aten,
    base,
    do_nothing,
    make_pass,
    net_program,
    node,
    registry,
    scale,
)

from odsora_compiler.errors import OdsoraError, PassError, UsageError, VerificationError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.program import Chunk, Plan, Program
from odsora_compiler.ir.serialize import fingerprint, load_program, save_program
from odsora_compiler.ir.weights import EncodedWeights, LookupTable, TensorWeights
from odsora_compiler.pipeline.base import Context, Pass
from odsora_compiler.pipeline.exactness import Close, Exact, Exactness, Lossy
from odsora_compiler.pipeline.instruments import (
    DriftCheck,
    Instrument,
    PassReport,
    PrintProgram,
    Timing,
    program_flops,
)
from odsora_compiler.pipeline.manager import PassManager, Pipeline, drift_checks, run_passes


def run(
    program: Program, passes: str, *classes: type[Pass], instruments: tuple[Instrument, ...] = ()
) -> list[PassReport]:
    manager = PassManager(list(instruments))
    manager.run(program, Pipeline.parse(passes, registry(*classes)))
    return manager.reports


# ------------------------------------------------------------------ before anything runs


def test_an_unknown_pass_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="there is no pass 'cild'") as caught:
        Pipeline.parse("cild", registry(make_pass("cidl"), make_pass("tdtm")))
    assert "'cidl'" in caught.value.hint


def test_a_pipeline_prints_back() -> None:
    made = registry(make_pass("a"), make_pass("b"))
    assert str(Pipeline.parse("a{level=2},b", made)) == "a{level=2},b"


@pytest.mark.parametrize(
    ("conditions", "message", "hint"),
    [
        ([{"requires": {"plan"}}], "'p0' requires plan, which nothing", "Add a pass"),
        ([{"requires": {"axis t"}}], "'p0' requires axis t", "Name the axis t on an input"),
        ([{"requires": {"axis b"}}], None, ""),
        ([{"establishes": {"f"}}, {"requires": {"f"}}], None, ""),
        ([{"requires": {"f"}}, {"establishes": {"f"}}], "'p0' requires f", "Put it after 'p1'"),
        (
            [{"establishes": {"f"}}, {"destroys": {"f"}}],
            "'p1' destroys 'f', which 'p0' establishes",
            "Put 'p1' before 'p0'",
        ),
        ([{"establishes": {"f"}}, {"destroys": {"f"}}, {"establishes": {"f"}}], None, ""),
        ([{"establishes": {"f"}}, {"destroys": {"f"}, "establishes": {"f"}}], None, ""),
        ([{"destroys": {"axis b"}}, {"requires": {"axis b"}}], "'p1' requires axis b", "axis b"),
    ],
)
def test_conditions_are_checked_before_anything_runs(
    conditions: list[dict[str, set[str]]], message: str | None, hint: str
) -> None:
    ran: list[str] = []
    classes = [make_pass(f"p{i}", ran=ran, **facts) for i, facts in enumerate(conditions)]  # type: ignore[arg-type]
    text = ",".join(cls.name for cls in classes)
    if message is None:
        run(net_program(), text, *classes)
        assert ran == text.split(",")
        return
    with pytest.raises(UsageError, match=message) as caught:
        run(net_program(), text, *classes)
    assert hint in caught.value.hint
    assert ran == []


def test_a_function_cannot_be_made_twice() -> None:
    ran: list[str] = []
    maker = make_pass("maker", derive, establishes={"function other"}, ran=ran)
    with pytest.raises(UsageError, match="function other, which the program has already"):
        run(net_program(), "maker,maker", maker)
    assert ran == []


def test_a_mistake_late_in_the_text_stops_everything() -> None:
    ran: list[str] = []
    good, bad = make_pass("good", ran=ran), make_pass("bad", ran=ran)
    for text in ("good,bad{level=x}", "good,bad{lvl=1}", "good,bd", "good,bad{"):
        with pytest.raises(UsageError):
            run_passes(net_program(), text, registry=registry(good, bad))
    assert ran == []


# ------------------------------------------------------------------ facts and history


def derive(program: Program, context: Context) -> None:
    program.component("model").derive("variant")


def plan(program: Program, context: Context) -> None:
    component = program.component("model")
    component.plan = Plan(1 << 20, "fp16", "bytes", (Chunk(1, {}, "end"),))
    for item in base(program).operators():
        item.meta["chunk"] = 0


def test_facts_and_history_follow_the_passes() -> None:
    program = net_program()
    run(
        program,
        "derive{level=2},other",
        make_pass("derive", derive, establishes={"function variant"}),
        make_pass("other", scale(1.0), establishes={"done"}, destroys={"axis b"}),
    )
    assert program.facts == {"axis c", "function variant", "done"}
    assert program.history == ["derive{level=2}", "other"]


def test_a_fact_the_program_itself_refutes_is_not_established() -> None:
    """After a pass that declined everything, what requires its work is stopped."""
    ran: list[str] = []
    maker = make_pass("maker", establishes={"function variant", "plan"})
    user = make_pass("user", requires={"function variant"}, ran=ran)
    program = net_program()
    with pytest.raises(
        PassError, match="'user' requires function variant, which the passes before"
    ):
        run(program, "maker,user", maker, user)
    assert ran == []
    assert program.facts == {"axis b", "axis c"}


def test_a_fact_may_hold_without_any_change() -> None:
    program = net_program()
    run(program, "tidy", make_pass("tidy", establishes={"tidy"}))
    assert "tidy" in program.facts


def test_destroying_the_plan_removes_it() -> None:
    program = net_program()
    run(program, "plan", make_pass("plan", plan, establishes={"plan"}))
    assert "plan" in program.facts
    run(program, "cut", make_pass("cut", scale(1.0), destroys={"plan"}))
    assert program.component("model").plan is None
    assert all("chunk" not in item.meta for item in base(program).graph.nodes)
    assert "plan" not in program.facts


def test_a_pass_that_changes_nothing_destroys_nothing() -> None:
    program = net_program()
    run(program, "plan", make_pass("plan", plan, establishes={"plan"}))
    run(program, "cut", make_pass("cut", destroys={"plan"}))
    assert program.component("model").plan is not None
    assert "plan" in program.facts


def test_run_passes_leaves_the_program_it_was_given_alone() -> None:
    program = net_program()
    before = fingerprint(program)
    result = run_passes(
        program, "double", registry=registry(make_pass("double", scale(2.0), exactness=Lossy()))
    )
    assert fingerprint(program) == before != fingerprint(result)
    assert (program.history, result.history) == ([], ["double"])


def test_a_program_can_be_saved_after_any_pass(tmp_path: object) -> None:
    program = net_program()
    run(program, "double", make_pass("double", scale(2.0)))
    loaded = load_program(save_program(program, f"{tmp_path}/p"))
    assert fingerprint(loaded) == fingerprint(program)
    assert loaded.history == ["double"]


# ------------------------------------------------------------------ changed is measured


def swap_weights(program: Program, context: Context) -> None:
    component = program.component("model")
    values = {name: component.weights.load(name) * 2 for name in component.used_weights()}
    component.weights = TensorWeights(values)


def encode(program: Program, context: Context) -> None:
    component = program.component("model")
    indices = torch.zeros(8, 4, dtype=torch.uint8)
    table = LookupTable(1, indices, torch.tensor([[0.5, 1.0]]))
    component.weights = EncodedWeights(component.weights, {"first.weight": table})


def there_and_back(program: Program, context: Context) -> None:
    editor = Editor(base(program), context.author)
    editor.call(aten.neg.default, node(program, "tanh"))
    editor.erase_dead()


@pytest.mark.parametrize(
    ("action", "changed"),
    [
        (do_nothing, False),
        (there_and_back, False),
        (scale(2.0), True),
        (derive, True),
        (plan, True),
        (encode, True),
        (swap_weights, True),
        (lambda program, context: node(program, "tanh").meta.update(provenance=None), None),
        (lambda program, context: program.redirect("model", "base", "base"), False),
        (lambda program, context: program.examples.update(x=program.examples["x"] * 2), False),
    ],
)
def test_changed_is_measured_not_believed(action: object, changed: bool | None) -> None:
    made = make_pass("p", action)  # type: ignore[arg-type]
    if changed is None:
        with pytest.raises(PassError, match="left a broken program"):
            run(net_program(), "p", made)
        return
    (report,) = run(net_program(), "p", made)
    assert report.changed is changed


# ------------------------------------------------------------------ exactness is enforced


def check(exactness: Exactness, action: object = do_nothing) -> PassReport:
    instrument = DriftCheck(tell=lambda text: None)
    made = make_pass("p", action, exactness=exactness)  # type: ignore[arg-type]
    (report,) = run(net_program(), "p", made, instruments=(instrument,))
    return report


def change_one_bit(program: Program, context: Context) -> None:
    """Multiply by the number next to 1: most results keep their bits, some change the last."""
    scale(1 + 2**-23)(program, context)


def not_a_number(program: Program, context: Context) -> None:
    scale(float("nan"))(program, context)


@pytest.mark.parametrize(
    ("exactness", "action"),
    [
        (Exact(), scale(1.0)),
        (Close(1e-5, 1e-6), change_one_bit),
        (Close(0.0, 1.0), scale(1.01)),
        (Lossy(), scale(3.0)),
        (Lossy("relative", 0.1), scale(1.01)),
        (Lossy("maximum", 0.1), scale(1.01)),
    ],
)
def test_what_is_declared_is_allowed(exactness: Exactness, action: object) -> None:
    drift = check(exactness, action).drift
    assert drift is not None
    assert drift.bit_equal is isinstance(exactness, Exact)


@pytest.mark.parametrize(
    ("exactness", "action", "message"),
    [
        (Exact(), change_one_bit, "exact, but the outputs are not bit-equal: relative"),
        (Exact(), swap_weights, "exact, but"),
        (Exact(), encode, "exact, but"),
        (Close(1e-5, 1e-6), scale(1.001), "close\\(rtol=1e-05, atol=1e-06\\), but output"),
        (
            Lossy("relative", 0.1),
            scale(2.0),
            "lossy.*, but its relative loss is .*, declared at most 0.1",
        ),
        (
            Lossy("maximum", 0.1),
            scale(2.0),
            "lossy.*, but its maximum loss is .*, declared at most 0.1",
        ),
        (Lossy(), not_a_number, ".*, but NaN or infinity in"),
        (Close(1e9, 1e9), not_a_number, ".*, but NaN or infinity in"),
    ],
)
def test_what_is_not_declared_is_an_error(
    exactness: Exactness, action: object, message: str
) -> None:
    with pytest.raises(PassError, match=f"pass 'p' is declared {message}"):
        check(exactness, action)


def test_a_loss_without_a_budget_is_reported() -> None:
    told: list[str] = []
    made = make_pass("p", scale(1.5), exactness=Lossy())
    run(net_program(), "p{level=2}", made, instruments=(DriftCheck(tell=told.append),))
    assert len(told) == 1
    assert re.match(r"p\{level=2\}: relative \d", told[0])


def test_a_function_nobody_calls_yet_is_held_to_it_too() -> None:
    """The host keeps calling `base`, so only the variant's own outputs show the change."""
    classes = (make_pass("derive", derive), make_pass("spoil", scale(2.0, function="variant")))
    program = net_program()
    with pytest.raises(PassError, match="'spoil' is declared exact"):
        run(program, "derive,spoil", *classes, instruments=(DriftCheck(),))


def test_each_pass_is_compared_with_the_program_just_before_it() -> None:
    classes = (
        make_pass("double", scale(2.0), exactness=Lossy()),
        make_pass("same", scale(1.0)),
    )
    reports = run(net_program(), "double,same", *classes, instruments=(DriftCheck(tell=str),))
    drifts = [report.drift for report in reports]
    assert drifts[0] is not None
    assert drifts[1] is not None
    assert (drifts[0].bit_equal, drifts[1].bit_equal) == (False, True)


def test_outputs_on_other_examples_are_not_held_against_the_next_pass() -> None:
    def other_examples(program: Program, context: Context) -> None:
        program.examples = {name: value + 1 for name, value in program.examples.items()}

    classes = (make_pass("examples", other_examples), make_pass("same", scale(1.0)))
    reports = run(net_program(), "examples,same", *classes, instruments=(DriftCheck(tell=str),))
    drift = reports[1].drift
    assert drift is not None and drift.bit_equal


def test_a_pass_that_changes_nothing_is_bit_equal_without_running() -> None:
    drift = check(Exact()).drift
    assert drift is not None
    assert drift.bit_equal


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown metric 'relativ'"):
        check(Lossy("relativ"), scale(2.0))


# ------------------------------------------------------------------ programs too large to run


def test_programs_over_the_limit_are_said_not_to_be_measured() -> None:
    program = net_program()
    flops = program_flops(program)
    assert flops == 2 * 3 * (4 * 8 + 8 * 4) + 3 * 8 + 3 * 4 + 3 * 8  # products, biases, tanh
    told: list[str] = []
    made = make_pass("p", scale(2.0))  # declared exact, and is not
    for _ in range(2):
        instrument = DriftCheck(flops - 1, told.append)
        run(net_program(), "p,p", made, instruments=(instrument,))
    assert len(told) == 2  # once a pipeline
    assert "not held to their exactness by numbers" in told[0]
    assert "--verify full" in told[0]
    with pytest.raises(PassError):
        run(net_program(), "p", made, instruments=(DriftCheck(flops),))


@pytest.mark.parametrize(("verify", "checked"), [("structure", 0), ("numeric", 1), ("full", 1)])
def test_levels_of_verification(verify: str, checked: int) -> None:
    assert len(drift_checks(verify)) == checked
    made = registry(make_pass("p", scale(2.0)))
    if checked:
        with pytest.raises(PassError, match="declared exact"):
            run_passes(net_program(), "p", verify=verify, registry=made)
    else:
        run_passes(net_program(), "p", verify=verify, registry=made)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown level of verification 'numerical'"):
        run_passes(net_program(), "", verify="numerical", registry=registry())


# ------------------------------------------------------------------ passes that fail


def raise_key_error(program: Program, context: Context) -> None:
    raise KeyError("missing")


def ask_for_nothing(program: Program, context: Context) -> None:
    program.component("modle")


def break_value(program: Program, context: Context) -> None:
    node(program, "tanh").meta["val"] = fake_tensor((3, 9), torch.float32)


def break_order(program: Program, context: Context) -> None:
    node(program, "linear_1").append(node(program, "tanh"))


def use_python(program: Program, context: Context) -> None:
    node(program, "tanh").target = torch.tanh


def drop_the_output(program: Program, context: Context) -> None:
    base(program).graph.erase_node(base(program).output_node)


def change_the_signature(program: Program, context: Context) -> None:
    program.host.output_node.meta["names"] = ("other",)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (raise_key_error, "pass 'p' failed: KeyError: 'missing'"),
        (ask_for_nothing, "pass 'p' failed: the program has no component 'modle'"),
        (break_value, "pass 'p' left a broken program: .*node 'tanh' claims float32\\[3, 9\\]"),
        (break_order, "pass 'p' left a broken program: .*before it has been defined"),
        (use_python, "pass 'p' left a broken program: .*cannot be saved"),
        (drop_the_output, "pass 'p' left a broken program"),
        (
            change_the_signature,
            "pass 'p' changed the program's signature from .*output.* to .*other",
        ),
    ],
)
def test_a_pass_that_fails_is_named(action: object, message: str) -> None:
    with pytest.raises(PassError, match=f"(?s){message}"):
        run(net_program(), "p", make_pass("p", action))  # type: ignore[arg-type]


def test_a_pass_that_writes_to_weights_is_refused() -> None:
    def write(program: Program, context: Context) -> None:
        program.component("model").weights.load("first.weight").mul_(2)

    # A program of its own: copies share their weights.
    program = capture(ModelSpec(Net(), {"x": torch.ones(3, 4)}))
    with pytest.raises(PassError, match=r"'p' left a broken program(?s:.*)'first.weight' was writ"):
        run(program, "p", make_pass("p", write))


def test_what_a_pass_says_itself_is_kept() -> None:
    def refuse(program: Program, context: Context) -> None:
        raise PassError("cannot", "Do something else.")

    with pytest.raises(PassError) as caught:
        run(net_program(), "p", make_pass("p", refuse))
    assert (caught.value.message, caught.value.hint) == ("cannot", "Do something else.")


def test_a_broken_program_is_refused_before_the_first_pass() -> None:
    ran: list[str] = []
    program = net_program()
    break_value(program, Context("test"))
    with pytest.raises(VerificationError):
        run(program, "p", make_pass("p", ran=ran))
    assert ran == []


def test_all_errors_are_of_the_family() -> None:
    assert issubclass(PassError, OdsoraError)
    assert (UsageError("").exit_code, PassError("").exit_code) == (2, 1)


# ------------------------------------------------------------------ instruments


class Witness(Instrument):
    """Writes down what it sees."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def before(self, program: Program, report: PassReport) -> None:
        self._log.append(f"{self._name} before {report.text}")

    def after(self, program: Program, report: PassReport) -> None:
        self._log.append(f"{self._name} after {report.text} {report.changed}")

    def finish(self, program: Program) -> None:
        self._log.append(f"{self._name} finish")


def test_instruments_see_every_pass_in_order() -> None:
    log: list[str] = []
    classes = (make_pass("a", scale(2.0), ran=log), make_pass("b", ran=log))
    run(net_program(), "a,b", *classes, instruments=(Witness("1", log), Witness("2", log)))
    assert log == [
        *("1 before a", "2 before a", "a", "1 after a True", "2 after a True"),
        *("1 before b", "2 before b", "b", "1 after b False", "2 after b False"),
        *("1 finish", "2 finish"),
    ]


def test_structure_is_verified_before_other_instruments_look() -> None:
    log: list[str] = []
    with pytest.raises(PassError):
        run(
            net_program(),
            "p",
            make_pass("p", break_value),
            instruments=(Witness("1", log),),
        )
    assert log == ["1 before p"]


def test_timing_is_of_the_pass_alone() -> None:
    import time

    class Slow(Instrument):
        def after(self, program: Program, report: PassReport) -> None:
            time.sleep(0.3)

    stream = io.StringIO()
    sleep = make_pass("sleep", lambda program, context: time.sleep(0.05))
    reports = run(net_program(), "sleep{level=2}", sleep, instruments=(Slow(), Timing(stream)))
    assert 0.05 <= reports[0].seconds < 0.3
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pass timing (seconds)"
    assert "100.0 %  sleep{level=2}  (changed nothing)" in lines[1]
    assert lines[2].endswith("total")


@pytest.mark.parametrize(
    ("when", "printed"),
    [("after-all", ["a", "b"]), ("after-changed", ["a"]), ("b", ["b"]), ("c", [])],
)
def test_the_program_is_printed_when_asked(when: str, printed: list[str]) -> None:
    stream = io.StringIO()
    classes = (make_pass("a", scale(2.0)), make_pass("b"))
    run(net_program(), "a,b", *classes, instruments=(PrintProgram(when, stream),))
    text = stream.getvalue()
    assert [line[9:] for line in text.splitlines() if line.startswith("// after")] == printed
    assert text.count("function model.base") == len(printed)
    assert ("by a" in text) == bool(printed)


def test_a_program_without_passes_is_printed_too() -> None:
    printed, silent = io.StringIO(), io.StringIO()
    run(net_program(), "", instruments=(PrintProgram("after-all", printed),))
    run(net_program(), "", instruments=(PrintProgram("after-changed", silent),))
    assert printed.getvalue() == f"// no passes\n{net_program()}\n"
    assert "function model.base" in printed.getvalue()
    assert silent.getvalue() == ""


def test_what_passes_say_reaches_the_user() -> None:
    told: list[str] = []

    def speak(program: Program, context: Context) -> None:
        context.note(f"precision {context.precision}")
        context.decline("site 3", "no time axis")

    manager = PassManager(precision="fp32", tell=told.append)
    manager.run(net_program(), Pipeline.parse("p", registry(make_pass("p", speak))))
    assert told == ["p: left site 3 alone: no time axis", "precision fp32"]
    assert [str(item) for item in manager.reports[0].declined] == told[:1]


def test_what_passes_say_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    def decline(program: Program, context: Context) -> None:
        context.decline("site 3", "no time axis")

    run_passes(net_program(), "p", registry=registry(make_pass("p", decline)))
    assert capsys.readouterr() == ("", "p: left site 3 alone: no time axis\n")


def test_a_pass_that_changes_what_was_cut_is_refused_whatever_is_verified() -> None:
    def cut_in_two(program: Program, context: Context) -> None:
        plan(program, context)
        component = program.component("model")
        component.plan = Plan(1 << 20, "fp16", "bytes", (Chunk(1, {}, "here"), Chunk(1, {}, "end")))
        node(program, "linear_1").meta["chunk"] = 1

    cut, program = make_pass("cut", cut_in_two), net_program()
    message = "pass 'twice' left a broken program(?s:.*)is in no chunk(?s:.*)cut functions"
    with pytest.raises(PassError, match=message):
        run(program, "cut,twice", cut, make_pass("twice", scale(2.0)))


# ------------------------------------------------------------------ analyses


def test_analyses_are_kept_until_the_function_changes() -> None:
    runs: list[str] = []

    def count_nodes(function: Function) -> int:
        runs.append(function.name)
        return len(list(function.graph.nodes))

    seen: list[int] = []

    def look(program: Program, context: Context) -> None:
        seen.append(context.analyses.of(count_nodes, base(program)))

    classes = (
        make_pass("look", look),
        make_pass("double", scale(2.0)),
        make_pass("derive", derive),
    )
    run(net_program(), "look,look,derive,look,double,look,look", *classes)
    assert runs == ["base", "base"]
    assert seen == [seen[0]] * 3 + [seen[0] + 1] * 2


def test_analyses_of_two_functions_are_apart() -> None:
    def names(function: Function) -> str:
        return function.name

    found: list[str] = []

    def look(program: Program, context: Context) -> None:
        functions = program.component("model").functions
        found.extend(context.analyses.of(names, function) for function in functions.values())

    run(net_program(), "derive,look", make_pass("derive", derive), make_pass("look", look))
    assert found == ["base", "variant"]


# ------------------------------------------------------------------ passes without options


def test_a_class_without_options_is_a_pass() -> None:
    class Bare(Pass):
        """No dataclass, no options."""

        name: ClassVar[str] = "bare"

        def run(self, program: Program, context: Context) -> None:
            """Nothing."""

    assert run(net_program(), "bare", Bare)[0].exactness == Exact()


def test_options_reach_the_pass() -> None:
    @dataclass(frozen=True)
    class Scale(Pass):
        """Multiply."""

        name: ClassVar[str] = "scale"
        by: float = 1.0

        @property
        def exactness(self) -> Exactness:
            return Exact() if self.by == 1.0 else Lossy()

        def run(self, program: Program, context: Context) -> None:
            scale(self.by)(program, context)

    check = DriftCheck(tell=str)
    (report,) = run(net_program(), "scale{by=1}", Scale, instruments=(check,))
    assert str(report.exactness) == "exact"
    (report,) = run(net_program(), "scale{by=2}", Scale, instruments=(DriftCheck(tell=str),))
    assert str(report.exactness) == "lossy(relative)"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are faster so, and their bits do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
