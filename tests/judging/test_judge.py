"""A judge that is a process of its own, over HTTP, with faults."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.judge import JudgeConfig
from optuna_merge.errors import JudgeBudgetError, JudgeError, JudgementError, TaskError
from optuna_merge.judging import Pairwise, Rubric, client
from optuna_merge.judging.client import check_judge
from optuna_merge.judging.judge import Judge
from optuna_merge.judging.rubric import Question
from optuna_merge.judging.store import JudgeCost, Judgements
from tests import processes
from tests.judging.judge_server import KEY, MODEL, UNLISTED, score
from tests.judging.servers import JudgeServer, judge

FAULTS = ["429", "500", "silence", "half", "outside", "death", "429", "outside", "half", "500", "death", "silence"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def options(server: JudgeServer, **changes: Any) -> JudgeConfig:
    given = {"model": MODEL, "key_variable": "JUDGE_KEY", "concurrency": 4, "timeout": 1.0, "patience": 60.0, **changes}
    return JudgeConfig(**{"url": server.url, **given})


def questions(n: int) -> list[Question]:
    rubric = Rubric("Rate it.")
    asked = [rubric.about({"question": f"What is {i}?", "reference": str(i)}, f"It is {i}.") for i in range(n)]
    return [question for [question] in asked]


def expected(asked: Sequence[Question]) -> list[float]:
    return [float(score(question.messages[0][1])) for question in asked]


def test_every_question_is_answered_once_whatever_happens_to_the_server(tmp_path: Path) -> None:
    asked = questions(30)
    store = Judgements(tmp_path / "judgements.sqlite")
    with judge(tmp_path / "server", *FAULTS) as server:
        assert Judge(options(server), store).ask([*asked, *asked]) == expected([*asked, *asked])
        assert [line["fault"] for line in server.log()][: len(FAULTS)] == FAULTS
        assert server.n_starts == 3
        assert server.answered() == {question.messages[0][1]: 1 for question in asked}
        # a later run, or another merge with equal answers, asks nothing
        n_asked = len(server.log())
        assert Judge(options(server), store).ask(asked[::-1]) == expected(asked[::-1])
        assert len(server.log()) == n_asked
    # a reply costs something, also one without a score
    assert store.cost() == JudgeCost(30 + 2, 100 * 32, 10 * 32)
    assert KEY.encode() not in (tmp_path / "judgements.sqlite").read_bytes()


def test_a_judge_that_never_answers_is_asked_again_and_given_up(tmp_path: Path) -> None:
    asked = questions(3)
    with judge(tmp_path / "server", "never", "drip", "drip") as server:
        start = time.monotonic()
        assert Judge(options(server), Judgements(tmp_path / "store")).ask(asked) == expected(asked)
        assert time.monotonic() - start < 10
        assert [line["fault"] for line in server.log()] == ["never", "drip", "drip", "", "", ""]
    with judge(tmp_path / "another", "never") as server:
        reason = "judge.url must be where a judge answers, got .*: timed out for 2 s; start it and run the study again"
        with pytest.raises(JudgeError, match=reason):
            Judge(options(server, patience=2.0), Judgements(tmp_path / "another store")).ask(asked)


def test_a_judge_that_talks_nonsense_gives_no_score(tmp_path: Path) -> None:
    store = Judgements(tmp_path / "judgements.sqlite")
    reason = "must give a score, but 3 times the last line must be 'Score: <number>', got 'I would rather not say.'"
    with judge(tmp_path / "server", "nonsense") as server:
        with pytest.raises(JudgementError, match=reason):
            Judge(options(server), store).ask(questions(1))
        assert len(server.log()) == 3
    assert store.scores(["any"]) == {}


def test_the_budget_ends_it_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    asked = questions(12)
    store = Judgements(tmp_path / "judgements.sqlite")
    with judge(tmp_path / "server") as server:
        with pytest.raises(JudgeBudgetError, match=r"judge\.budget must leave questions to ask, got 7, of which"):
            Judge(options(server, budget=7), store).ask(asked)
        cost = store.cost()
        assert cost is not None
        assert cost.n_replies == len(server.log()) == 7
        assert Judge(options(server, budget=12), store).ask(asked) == expected(asked)
        assert len(server.log()) == 12


def test_several_judgements_of_one_answer_are_asked_apart_and_at_a_bounded_rate(tmp_path: Path) -> None:
    asked = questions(2)
    store = Judgements(tmp_path / "judgements.sqlite")
    with judge(tmp_path / "server") as server:
        several = options(server, n_judgements=3, requests_per_minute=60 / 0.2)
        start = time.monotonic()
        assert Judge(several, store).ask(asked) == expected(asked)
        assert time.monotonic() - start >= 5 * 0.2
        assert set(server.answered().values()) == {3}


def test_two_processes_with_equal_answers_ask_once(tmp_path: Path) -> None:
    asked, path = questions(12), tmp_path / "judgements.sqlite"

    def worker(name: str) -> None:
        scores = Judge(options(server), Judgements(path)).ask(asked)
        (tmp_path / name).write_text(repr(scores))

    with judge(tmp_path / "server", *["slow"] * 12) as server:
        names = ["first", "second", "third"]
        with processes.forked(*[partial(worker, name) for name in names]) as running:
            while len(server.log()) < 4:
                time.sleep(0.01)
            processes.kill(running[0])  # what it asked for is asked by another one
            for process in running[1:]:
                process.join(60)
                assert process.exitcode == 0
        assert [(tmp_path / name).read_text() for name in names[1:]] == [repr(expected(asked))] * 2
        times = Counter(line["prompt"] for line in server.log())
        assert len(times) == 12
        assert sum(times.values()) <= 12 + 4  # the four that were open when it was killed


def test_what_a_server_takes_besides_is_sent_and_makes_another_judge(tmp_path: Path) -> None:
    asked, store = questions(2), Judgements(tmp_path / "store")
    with judge(tmp_path / "server") as server:
        plain = Judge(options(server), store)
        strict = Judge(options(server, extra_body={"structured_outputs": {"choice": ["Score: 1"]}}), store)
        plain.ask(asked)
        assert strict.ask(asked) == [1.0, 1.0]
        assert strict.ask(asked) == [1.0, 1.0]
        assert len(server.log()) == 4
    assert strict.identity == plain.identity + ', {"structured_outputs": {"choice": ["Score: 1"]}}'


def test_a_judge_that_is_away_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "_SILENT_S", 0.3)
    with judge(tmp_path / "server", *["429"] * 12) as server:
        assert Judge(options(server), Judgements(tmp_path / "store")).ask(questions(4)) == expected(questions(4))
    [line] = [record.getMessage() for record in caplog.records if record.name == client.__name__]
    assert line == f"the judge at {server.url} is away: 429 Too Many Requests too many; waiting for it, up to 60 s"


def test_wrong_set_ups_are_seen_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judge(tmp_path / "server") as server:
        right = options(server)
        check_judge(right)
        check_judge(options(server, model=UNLISTED))
        check_judge(options(server, extra_body={"structured_outputs": {"regex": "Score: [1-5]"}}))
        wrong = {
            "judge.model must be one that .* has \\(judge-7b\\), got 'other'; correct it": options(
                server, model="other"
            ),
            "judge.url must be where a judge answers, got .*/v2: .*404": options(server, url=server.url[:-1] + "2"),
            "judge.url must be where a judge answers, got http://127.0.0.1:9/v1: .*refused": options(
                server, url="http://127.0.0.1:9/v1"
            ),
            "judge.extra_body must be what .* takes, got .*'400 Bad Request .*colour.*'; correct it": options(
                server, extra_body={"colour": "red"}
            ),
            "judge.extra_body must be what .* takes, got 500 .*grammar; correct it": options(
                server, extra_body={"structured_outputs": {"regex": "["}}
            ),
            "must accept the key, got '401 .* for no key; set judge.key_variable": options(server, key_variable=""),
            "environment variable that is set, got NO_KEY, which is not set": options(server, key_variable="NO_KEY"),
        }
        for message, given in wrong.items():
            with pytest.raises(JudgeError, match=message) as caught:
                check_judge(given)
            assert "\n" not in str(caught.value)
        monkeypatch.setenv("JUDGE_KEY", f"{KEY}-old")
        with pytest.raises(JudgeError, match=r"must accept the key, got '401 .*for the key in JUDGE_KEY") as caught:
            check_judge(right)
        assert f"{KEY}-old" not in str(caught.value)  # although the server sent it back
        assert not server.log()


@pytest.mark.parametrize(
    ("reply", "score_or_fault"),
    [
        ("Good.\nScore: 4", 4.0),
        ("Score: 1.5\n\n", 1.5),
        ("Score: 4 out of 5", "the last line must be"),
        ("**Score: 4**", "the last line must be"),
        ("Score: 4\nI hope this helps.", "the last line must be"),
        ("", "the last line must be"),
        ("Score: 0", "the score must be from 1 to 5, got 0"),
        ("Score: 55", "the score must be from 1 to 5, got 55"),
    ],
)
def test_scores_are_read_strictly(reply: str, score_or_fault: float | str) -> None:
    [question] = questions(1)
    if isinstance(score_or_fault, float):
        assert question.read(reply) == score_or_fault
    else:
        with pytest.raises(ValueError, match=score_or_fault):
            question.read(reply)


def test_a_fixed_answer_is_compared_in_both_orders(tmp_path: Path) -> None:
    rubric = Pairwise("Which is better?")
    documents = [{"question": f"What is {i}?", "rival": f"Surely {i}."} for i in range(6)]
    answers = [["It is.", "Nobody knows."]] * 6
    with judge(tmp_path / "server") as server:
        rubric.ask = Judge(options(server), Judgements(tmp_path / "store")).ask
        scores = rubric(answers, documents)
        prompts = [line["prompt"] for line in server.log()]
        n_asked = len(prompts)
        assert rubric(answers, documents) == scores  # nothing is asked again
        assert len(server.log()) == n_asked == 6 * 2 * rubric.n_questions
    is_first = [p.index("It is.") < p.index("Surely") for p in prompts if "It is." in p]
    assert sorted(is_first) == [False] * 6 + [True] * 6
    # the judge prefers whatever is answer A: a tie in both orders together
    assert scores == [[0.5, 0.5]] * 6
    assert rubric.score([1, 0]) == 1
    assert rubric.score([0, 1]) == 0
    assert rubric.score([1, 0.5]) == 0.75
    with pytest.raises(TaskError, match=r"rival must name a field of the documents \(question\), got 'rival'"):
        rubric.about({"question": "?"}, "an answer")


def test_a_rubric_that_cannot_be_used() -> None:
    with pytest.raises(TaskError, match="lowest must be below highest, got 5 and 5"):
        Rubric("Rate it.", 5, 5)
    with pytest.raises(TaskError, match=r"question must name a field of the documents \(prompt\), got 'question'"):
        Rubric("Rate it.").about({"prompt": "?"}, "an answer")
    with pytest.raises(TaskError, match="a study that names a judge"):
        Rubric("Rate it.")([["an answer"]], [{"question": "?"}])
