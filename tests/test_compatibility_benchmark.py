"""What the comparison of OpenCLIP's own tests counts, against reports written by hand."""

from __future__ import annotations

from pathlib import Path

import compatibility

from openclip_otco.patch import installation

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped message="no network"/></testcase>
<testcase classname="tests.test_a" name="test_four"><error message="setup"/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert compatibility.outcomes(report) == {
        "tests.test_a::test_one": "passed",
        "tests.test_a::test_two": "failed",
        "tests.test_a::test_three": "skipped",
        "tests.test_a::test_four": "failed",
    }


def test_what_differs_is_named() -> None:
    ours = {"a": "passed", "b": "failed", "c": "skipped"}
    assert compatibility.compare(ours, ours) == {
        "passed": 1, "failed": 1, "skipped": 1, "failed_without": 1, "differ": [],
    }  # fmt: skip
    found = compatibility.compare(ours, {"a": "passed", "b": "passed", "d": "passed"})
    assert found["differ"] == ["b", "c", "d"]
    assert found["failed_without"] == 0


def test_each_supported_version_has_a_commit() -> None:
    assert [compatibility.commit(version) for version in installation.supported_versions()] == [
        "v3.2.0",
        "v3.3.0",
        installation.COMMITS["4.2.0.dev0"],
    ]
