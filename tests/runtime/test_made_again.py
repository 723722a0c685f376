"""A KV cache that does not fit is made again for the question that wants it, and then published."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from memfs.config import Config
from memfs.runtime.client import RuntimeClient, connect
from tests.waiting import until

from .conftest import Shop, ask, how, prose


def chose(report: dict) -> dict:
    """How its only cube came."""
    (line,) = report["cubes"]
    return line["chose"]


def test_an_append_costs_the_appended_part(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(1500))
    tokens = runtime.call("encode", **cube)["tokens"]
    old = shop.digest("a")
    shop.cube("a", prose(1500) + " and then the wind turned")
    report = ask(runtime, [cube])
    assert how(report) == ["kv"]
    assert chose(report)["way"] == "made again"
    assert "payload_sha256" in chose(report)["why"]
    kept = chose(report)["kept_tokens"]
    assert tokens - 256 <= kept <= tokens, "all but the last chunk"
    rest = report["cubes"][0]["tokens"] - kept
    plain = ask(runtime, [cube], kv=False)
    assert report["prompt_tokens"] - report["cached_tokens"] == rest + (
        plain["prompt_tokens"] - plain["cached_tokens"] - plain["cubes"][0]["tokens"]
    )
    assert report["answer"] == plain["answer"]
    assert chose(ask(runtime, [cube]))["way"] == "resident"

    until(lambda: shop.digest("a") != old)
    new = shop.digest("a")
    assert not runtime.call("encode", **cube)["made"], "it is whole, and it fits"
    assert chose(ask(runtime, [cube]))["way"] == "resident", "the file is the rows' own now"
    runtime.call("unmount", **cube)
    again = ask(runtime, [cube])
    assert (chose(again)["way"], again["answer"]) == ("file", report["answer"])
    runtime.call("encode", **cube, force=True)
    assert shop.digest("a") == new, "as if made from nothing"


@pytest.mark.parametrize("edit", ["first", "cut"])
def test_other_edits(runtime: RuntimeClient, shop: Shop, edit: str) -> None:
    cube = shop.cube("a", prose(600))
    runtime.call("encode", **cube)
    old = shop.digest("a")
    shop.cube("a", "New: " + prose(600) if edit == "first" else prose(300))
    report = ask(runtime, [cube])
    assert (chose(report)["kept_tokens"] > 0) == (edit == "cut")
    assert report["answer"] == ask(runtime, [cube], kv=False)["answer"]
    until(lambda: shop.digest("a") != old)
    made = shop.digest("a")
    runtime.call("encode", **cube, force=True)
    assert shop.digest("a") == made


def test_several_cubes_are_of_the_text_as_it_is(runtime: RuntimeClient, shop: Shop) -> None:
    """What was placed of an earlier text is not answered from, whatever lies in the file."""
    cubes = [shop.cube("a", prose(400)), shop.cube("b", prose(100, 3))]
    for cube in cubes:
        runtime.call("encode", **cube)
    ask(runtime, cubes)
    shop.cube("a", prose(20, 5))
    report = ask(runtime, cubes)
    assert report["cubes"][0]["chose"]["way"] == "made again"
    assert report["prompt_tokens"] == ask(runtime, cubes, kv=False)["prompt_tokens"]


def test_an_encode_takes_what_a_question_made(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(300))
    runtime.call("encode", **cube)
    shop.cube("a", prose(300) + " more")
    ask(runtime, [cube])
    events = list(runtime.stream("encode", **cube))
    assert all(event.get("event") != "progress" for event in events), "nothing is computed for it"
    assert chose(ask(runtime, [cube]))["way"] == "resident"


def test_a_cube_of_text_alone_stays_one(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(40))
    for _ in range(2):
        report = ask(runtime, [cube])
        assert how(report) == ["text"]
        assert chose(report) is None
        assert report["cubes"][0]["why"] == "it has no kv.safetensors"
    time.sleep(0.2)
    assert not shop.kv("a").exists()


def test_questions_at_once_share_the_work(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    cube = shop.cube("a", prose(900))
    runtime.call("encode", **cube)
    shop.cube("a", "Else: " + prose(900))

    def one(_: int) -> str:
        with connect(tiny_config, start=False) as client:
            return str(chose(ask(client, [cube]))["way"])

    with ThreadPoolExecutor(4) as threads:
        ways = list(threads.map(one, range(4)))
    assert sorted(ways) == ["made again", *["resident"] * 3]


def test_a_session_goes_on_with_what_was_edited(runtime: RuntimeClient, shop: Shop) -> None:
    runtime.call("unmount")
    cubes = [shop.cube(name, prose(60, seed)) for seed, name in enumerate("ab")]
    for cube in cubes:
        runtime.call("encode", **cube, mount=True)
    shop.cube("a", prose(60) + " edited")
    runtime.call("changed", **cubes[0])
    report = ask(runtime, None)
    assert how(report) == ["kv", "kv"]
    assert [c["chose"]["way"] for c in report["cubes"]] == ["made again", "resident"]
    runtime.call("unmount")
