"""Plans are carried out in the order of what they need, in parallel where they may."""

import threading
import time

import pytest

from experiments.tinyagent.executor import execute
from experiments.tinyagent.plan import Plan, Step, parse_plan


def run(text, **tools):
    last = len(text.splitlines()) + 1
    return execute(parse_plan(f"{text}\n{last}. join()"), tools)


def test_results_reach_those_that_need_them_as_they_are():
    seen = []
    outcomes = run(
        '1. make()\n2. take("$1", ["$1", 2], "it is $1")',
        make=lambda: {"a": 1},
        take=lambda *given: seen.append(given),
    )
    assert seen == [({"a": 1}, [{"a": 1}, 2], "it is {'a': 1}")]
    assert outcomes[1].arguments == seen[0]
    assert outcomes[0].ended <= outcomes[1].started


def test_independent_steps_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=30)  # passed by two or by none
    outcomes = run(
        "1. wait()\n2. wait()\n3. both($1, $2)",
        wait=barrier.wait,
        both=lambda one, other: one + other,
    )
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert outcomes[2].result == 1


def test_a_failure_takes_those_with_it_that_need_it_and_no_others():
    def fail():
        raise KeyError("nobody")

    called = []
    outcomes = run(
        "1. fail()\n2. use($1)\n3. use($2)\n4. use(5)", fail=fail, use=called.append
    )
    assert outcomes[0].error == "KeyError: 'nobody'"
    assert outcomes[1].error == "step 1, which it needs, has failed"
    assert outcomes[2].error == "step 2, which it needs, has failed"
    assert outcomes[3].error is None and called == [5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1. ok(1)\n2. eval(1)", "step 2 calls eval, which is none of the tools"),
        ("1. ok(1)\n2. ok()", r"step 2 gives ok 0 arguments, it takes \(x\)"),
        ("1. ok(1, 2)", "step 1 gives ok 2 arguments"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_called(text, message):
    called = []

    def ok(x):
        called.append(x)

    with pytest.raises(ValueError, match=message):
        run(text, ok=ok)
    assert not called


def test_a_plan_by_hand_that_cannot_go_on_is_refused():
    plan = Plan((Step(1, "ok", ("$2",)), Step(2, "ok", ("$1",))))
    with pytest.raises(ValueError, match=r"step 1 needs \(2,\), not all of them"):
        execute(plan, {"ok": print})


def test_no_more_workers_than_given():
    running, most = [], []
    lock = threading.Lock()

    def work():
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.pop()

    plan = parse_plan("\n".join([f"{n}. work()" for n in range(1, 9)] + ["9. join()"]))
    for workers in (1, 3):
        most.clear()
        assert len(execute(plan, {"work": work}, workers)) == 8
        assert max(most) == workers
