"""Who takes which task, and what is counted: without processes."""

from __future__ import annotations

import threading

import pytest
from fake_mocks import group_of

from opkit.collect.measurement import Measurement
from opkit.collect.work import Group, Row
from opkit.collect.workers.board import Board
from opkit.collect.workers.tally import Tally


def board_of(*groups: Group) -> Board:
    return Board(groups, stopped=lambda: False)


def test_lanes_take_free_groups_first_then_the_fullest() -> None:
    board = board_of(
        group_of("ok", "ok", name="small"), group_of(*["ok"] * 9, name="large")
    )  # fmt: skip
    joined = [board.join(lane) for lane in ("a", "b", "c", "d")]
    assert [lot.group.name for lot in joined if lot] == ["small", "large", "large", "large"]


def test_a_lane_waits_while_another_may_give_its_task_back() -> None:
    board = board_of(group_of("ok"))
    lot = board.join("a")
    assert lot is not None
    job = board.take("a", lot)
    assert job is not None
    found: list[object] = []
    waiter = threading.Thread(target=lambda: found.append(board.join("b")))
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    board.give_back("a", lot, job)
    waiter.join(5)
    assert found == [lot]


def test_a_lane_does_not_wait_for_a_group_it_gave_up() -> None:
    board = board_of(group_of("ok"))
    lot = board.join("a")
    assert lot is not None
    board.leave("a", lot, "it died")
    other = board.join("b")
    assert other is lot
    assert board.take("b", lot) is not None
    assert board.join("a") is None


def test_a_task_tried_again_is_a_lot_of_its_own() -> None:
    board = board_of(group_of("ok", "ok"))
    lot = board.join("a")
    assert lot is not None
    first = board.take("a", lot)
    assert first is not None
    board.again("a", lot, first)
    assert board.take("a", lot) is not None
    board.settle("a")
    board.leave("a", lot)
    retry = board.join("a")
    assert retry is not None
    assert retry.fresh
    assert board.take("a", retry) is first
    board.settle("a")
    assert board.left() == []


def test_a_stopped_board_gives_nothing_out() -> None:
    board = Board([group_of("ok")], stopped=lambda: True)
    assert board.join("a") is None
    assert [len(tasks) for _, tasks, _ in board.left()] == [1]


def test_the_rate_is_that_of_late() -> None:
    now = [0.0]
    tally = Tally(200, 2, clock=lambda: now[0])
    row = Row("a", "g", "t", {}, {}, Measurement((1000.0,)))
    assert tally.status().rate is None
    for _ in range(60):
        now[0] += 10.0
        tally.row(row)
    for _ in range(60):
        now[0] += 1.0
        tally.row(row)
    status = tally.status()
    assert status.rate == pytest.approx(60.0)
    assert status.eta_s == pytest.approx(80.0)
    assert status.busy == pytest.approx(120 / (660 * 2))


def test_the_largest_cost_is_named() -> None:
    tally = Tally(1, 1, clock=iter([0.0, 10.0]).__next__)
    tally.spend({"measure": 5.0, "build": 3.0})
    tally.spend({"prepare": 1.0})
    outcome = tally.outcome((), "")
    assert outcome.largest_cost == "build"
    assert outcome.activities["rest"] == pytest.approx(1.0)
