# SPDX-License-Identifier: GPL-3.0-or-later
"""The pytest plugin, in runs of pytest of its own: what the fixture does, and what a failure tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parent.parent

APP = """
    from milter import Milter, Reply

    app = Milter("guard")

    @app.on_rcpt
    def on_rcpt(ctx, recipient, params):
        return Reply(550, "5.7.1", "not for you") if recipient.startswith("boss@") else None

    @app.on_message
    def on_message(ctx, message):
        message.headers["X-Scanned"] = "clean"
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> "Run":
    """Run pytest in a process of its own, with the plugin, over a test file."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return Run(pytester)


class Run:
    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester

    def __call__(self, test: str, *options: str, app: str = APP) -> pytest.RunResult:
        self._pytester.makepyfile(app=app, test_it=test)
        return self._pytester.runpytest_subprocess("-p", "pytest_milter", *options)


def test_the_fixture_makes_as_many_mtas_as_a_test_wants(run: Run) -> None:
    result = run(
        """
        from app import app

        def test_one(milter_mta):
            result = milter_mta(app).send(recipients="boss@mta.example")
            assert result.rejected

        def test_two(milter_mta):
            postfix, sendmail = milter_mta(app), milter_mta(app, like="sendmail")
            assert postfix.send().headers["x-scanned"] == sendmail.send().headers["x-scanned"] == "clean"
        """
    )
    result.assert_outcomes(passed=2)


def test_an_mta_lives_as_long_as_its_test(run: Run) -> None:
    result = run(
        """
        from milter import Milter
        events = []
        app = Milter("hooked")
        app.on_start(lambda: events.append("start"))
        app.on_stop(lambda: events.append("stop"))

        def test_one(milter_mta):
            milter_mta(app)
            assert events == ["start"]

        def test_two():
            assert events == ["start", "stop"]
        """
    )
    result.assert_outcomes(passed=2)


def test_what_is_raised_at_the_end_is_an_error_of_the_test(run: Run) -> None:
    result = run(
        """
        from milter import Milter
        app = Milter("closing")

        @app.on_mail
        def on_mail(ctx, sender, params):
            raise LookupError("nobody waited for this")

        def test_one(milter_mta):
            client = milter_mta(app).client()
            client.negotiate()
            client.connect_info()
            client.mail("<ann@client.example>")
        """
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*LookupError: nobody waited for this"])


def test_a_failure_tells_what_the_filter_did(run: Run) -> None:
    result = run(
        """
        from app import app

        def test_one(milter_mta):
            result = milter_mta(app).send(message="Subject: test\\n\\ntext\\n")
            assert not result.accepted
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*where True = <Result: accepted: 250 2.0.0 Ok: queued as *>.accepted",
            "*- filter under test -*",
            "accepted: 250 2.0.0 Ok: queued as *",
            "  rcpt     <bob@mta.example> * continue",
            "  eom * continue",
            "  add header X-Scanned: clean",
            "--- as sent",
            "+++ as delivered",
            " Subject: test",
            "+X-Scanned: clean",
        ]
    )


def test_an_mta_without_the_fixture_is_told_of_too(run: Run) -> None:
    result = run(
        """
        from app import app
        from milter.testing import MTA

        def test_one():
            with MTA(app) as mta:
                results = [mta.send(recipients=name + "@mta.example") for name in ("bob", "boss")]
            assert all(result.accepted for result in results)
        """
    )
    result.stdout.fnmatch_lines(
        [
            "*- filter under test, message 1 -*",
            "accepted: *",
            "*- filter under test, message 2 -*",
            "rejected at rcpt: 550 5.7.1 not for you",
        ]
    )


def test_an_exception_of_a_handler_is_shown_where_it_was_raised(run: Run) -> None:
    result = run(
        """
        from milter import Milter
        app = Milter("raising")

        @app.on_mail
        def on_mail(ctx, sender, params):
            raise LookupError("what is wrong")

        def test_one(milter_mta):
            milter_mta(app).send()
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>       raise LookupError("what is wrong")',
            "E       LookupError: what is wrong",
            "E       raised by on_mail, the handler of on_mail",
            "*- filter under test -*",
            "deferred at mail: *",
        ]
    )


def test_two_messages_are_compared_line_by_line(run: Run) -> None:
    result = run(
        """
        from app import app

        def test_one(milter_mta):
            result = milter_mta(app).send(message="Subject: test\\n\\none\\ntwo\\n")
            assert result.message == b"Subject: test\\r\\n\\r\\none\\r\\nthree\\r\\n"
        """
    )
    result.stdout.fnmatch_lines(
        [
            "E *assert the messages differ:",
            "E * --- left",
            "E * +++ right",
            "E *  Subject: test",
            "E * -X-Scanned: clean",
            "E *  one",
            "E * -two",
            "E * +three",
        ]
    )


def test_messages_of_one_test_are_not_told_of_in_another(run: Run) -> None:
    result = run(
        """
        from app import app

        def test_one(milter_mta):
            milter_mta(app).send()

        def test_two(milter_mta):
            assert False
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.no_fnmatch_line("*filter under test*")


def test_other_bytes_are_compared_as_pytest_does(run: Run) -> None:
    result = run(
        """
        import milter.testing

        def test_one():
            assert b"one" == b"two"
        """
    )
    result.stdout.no_fnmatch_line("*messages differ*")


def test_workers_of_xdist_have_a_filter_each(run: Run) -> None:
    pytest.importorskip("xdist")
    result = run(
        """
        import pytest
        from app import app

        @pytest.mark.parametrize("number", range(8))
        def test_one(milter_mta, number):
            assert milter_mta(app).send().accepted

        def test_two(milter_mta):
            assert milter_mta(app).send().rejected
        """,
        "-n2",
    )
    result.assert_outcomes(passed=8, failed=1)
    result.stdout.fnmatch_lines(["*- filter under test -*", "accepted: 250 *"])


def test_who_sets_a_breakpoint_gets_a_debugger(run: Run, pytester: pytest.Pytester) -> None:
    """In a handler, that is on a thread of libmilter: what is typed there is read."""
    pytester.makepyfile(
        app="""
        from milter import Milter
        app = Milter("stopping")

        @app.on_mail
        def on_mail(ctx, sender, params):
            breakpoint()
        """,
        test_it="""
        from app import app

        def test_one(milter_mta):
            assert milter_mta(app).send().accepted
        """,
    )
    result = pytester.run(
        sys.executable, "-m", "pytest", "-p", "pytest_milter", "-s", stdin=b"p 'sender: ' + sender\nc\n"
    )
    result.stdout.fnmatch_lines(["*'sender: ann@client.example'*"])
    result.assert_outcomes(passed=1)


def test_a_run_that_tests_no_filter_loads_nothing_of_the_library(run: Run) -> None:
    result = run(
        """
        import sys

        def test_one():
            assert [name for name in sys.modules if name.partition(".")[0] == "milter"] == []
        """
    )
    result.assert_outcomes(passed=1)


def test_the_library_needs_no_pytest(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('there is no pytest')")
    program = "import milter.testing; milter.testing.MTA(milter.Milter('idle')); print('done')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "done\n"


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_milter": "pytest_milter"}
    assert project["tool"]["setuptools"]["py-modules"] == ["pytest_milter"]
