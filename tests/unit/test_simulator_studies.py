"""The studies from their command line: tables, plots, pages, wrong usage."""

from __future__ import annotations

import io
import json

import pytest

from shoal.errors import UserError
from shoal.simulator.__main__ import main
from shoal.simulator.fluid.arrangement import Delays
from shoal.simulator.studies import balance
from shoal.simulator.studies.report import Report, Table, put_into_page, write
from shoal.simulator.studies.settings import GOALS, HOUR, WARM_UP
from shoal.simulator.studies.side_by_side import RunGrid
from shoal.simulator.studies.study_progress import progress

FAST = ["--hours", "0.2", "--runs", "1"]


def test_rules_are_compared_side_by_side(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- side-by-side: written by the simulator --> old <!-- end of side-by-side -->\nafter\n")
    arguments = ["side-by-side", "--only", "5 copies", "--rules", "no moves", "Parallax", *FAST]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--page", str(page)]) == 0
    printed = capsys.readouterr()
    assert "no moves" in printed.out
    assert "100 %" in printed.err
    table = (tmp_path / "out" / "side-by-side.md").read_text()
    assert "| mean life 10 h, 2.5 copies | no moves |" in table
    assert (tmp_path / "out" / "side-by-side.svg").stat().st_size > 1000
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert " old " not in text
    assert "(out/side-by-side.svg)" in text


def test_equal_seeds_print_equal_tables_whatever_the_number_of_jobs(capsys):
    arguments = ["side-by-side", "--only", "8 copies", "--rules", "no moves", "graded joining", *FAST]
    assert main(arguments) == 0
    one = capsys.readouterr().out
    assert main([*arguments, "--jobs", "2"]) == 0
    assert capsys.readouterr().out == one


def test_balance_is_compared_with_a_search(capsys):
    assert main(["balance", "--only", "8 copies", "--rules", "no moves", "--tries", "20", *FAST]) == 0
    assert "of an offline search" in capsys.readouterr().out


def test_the_lines_of_the_balance_plot_go_from_the_beginning_to_the_end():
    scene = GOALS[-1].scene(seed=0, hours=0.2, delays=Delays())
    grid = RunGrid(GOALS[-1:], ["no moves"], [0], 0.2, Delays(), 60.0)
    (found,) = balance.run_all(grid, lambda share, now: None, num_tries=1)
    assert (found.times[0], found.times[-1]) == (0.0, pytest.approx((scene.seconds - WARM_UP) / HOUR))
    assert len(found.shares) == len(found.times)


def test_a_cluster_from_a_file_is_compared_with_its_published_placement(tmp_path, capsys):
    file = tmp_path / "clusters.json"
    profile = {"m": {"x": {"max_blocks": 3, "tokens_per_s": [30, 14, 9]}}}
    cluster = {"nodes": ["x"] * 4, "uniform_link": [1e9, 0.001], "profiles": profile}
    cluster["layouts"] = {"m": {"by hand": [[0, 3], [3, 6], [0, 3], [3, 6]]}}
    file.write_text(json.dumps({"models": {"m": {"blocks": 6, "activation_bytes": 2}}, "clusters": {"c": cluster}}))
    rules = ["no moves", "Parallax", "GBP-CR"]
    assert main(["at-rest", "--cluster", str(file), "--only-clusters", "--rules", *rules, "--tries", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("by hand, published" in line and "18" in line for line in lines)
    assert any("offline search" in line for line in lines)


def test_a_large_swarm_is_simulated_with_its_clients(capsys):
    small = ["--servers", "60", "--blocks", "12", "--clients", "20", "--quiet", "90", "--busy", "30"]
    assert main(["ten-thousand", *small]) == 0
    assert "20, " in capsys.readouterr().out


def test_traces_are_fitted(tmp_path, capsys):
    file = tmp_path / "some-trace.json"
    changes = [number for turn in range(9) for number in (100 * turn, turn % 3, 100 * turn + 30 + turn, 0)]
    file.write_text(json.dumps({"most_per_zone": 2, "zones": {"z": {"seconds": 900, "changes": changes}}}))
    profiles = {"small": {"max_blocks": 1, "tokens_per_s": [9]}, "big": {"max_blocks": 2, "tokens_per_s": [18, 8]}}
    cluster = {"nodes": ["small", "big"], "profiles": {"m": profiles}, "uniform_link": [1e9, 0.001]}
    clusters = tmp_path / "clusters.json"
    models = {"m": {"blocks": 4, "activation_bytes": 1000}}
    clusters.write_text(json.dumps({"models": models, "clusters": {"two": cluster}}))
    assert main(["fit", "--trace", str(file), "--cluster", str(clusters), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "some-trace: zone has none" in printed
    assert "2 .35 1.00 .00 1.00 .89 to 1.00" in [" ".join(line.split()) for line in printed.splitlines()]
    assert (tmp_path / "fit.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["side-by-side", "--rules", "magic"], "no rule 'magic'"),
        (["side-by-side", "--only-traces"], "no churn is left"),
        (["fit", "--trace", "nowhere.json"], "cannot read nowhere.json"),
        (["calibrate", "--measured", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_hint(arguments, message, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "hint:" in printed


def test_a_page_without_a_place_for_a_study_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(UserError, match="no place for a-study"):
        put_into_page(page, "a-study", "text")
    assert page.read_text() == "nothing here"


def test_results_name_the_machine_and_the_command(tmp_path):
    report = Report("a-study", "A study", (Table(("a", "b"), (("1", "2"),)),), "A note.")
    write(report, tmp_path, None, None)
    text = (tmp_path / "a-study.md").read_text()
    assert text.startswith("| a | b |\n| --- | --- |\n| 1 | 2 |\n\nA note.\n")
    assert "python -m shoal.simulator" in text
    assert "cores" in text


def test_progress_goes_to_a_log_as_a_line_now_and_then():
    now = [0.0]
    stream = io.StringIO()
    with progress("a study", stream=stream, clock=lambda: now[0]) as advance:
        for _ in range(10):
            advance(0.1, "a part")
            now[0] += 4.0
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # at 0, 12, 24 and 36 seconds
    assert lines[0].startswith("a study [##")
    assert "100 %" in lines[-1]
