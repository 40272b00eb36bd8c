# SPDX-License-Identifier: GPL-3.0-or-later
"""Decorating functions: what is accepted, what is refused and how that is told; what the registry implies."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from milter import Actions, Context, EomContext, Milter, ProtocolOptions, RegistrationError, Reply, Stage, Status
from milter.plan import make_plan
from milter.protocol import MacroList

HANDLED_STAGES = [stage for stage in Stage if stage is not Stage.NEGOTIATE]


def accept_anything(*arguments: Any) -> Status:
    return Status.CONTINUE


def observe_anything(*arguments: Any) -> None:
    return None


@pytest.mark.parametrize("stage", list(Stage))
def test_a_handler_with_a_parameter_too_many_is_refused_with_the_right_signature(stage: Stage) -> None:
    app = Milter("test")
    decorate: Callable[..., Any] = getattr(app, stage.decorator)

    def wrong(ctx: Any, a: Any, b: Any, c: Any, d: Any) -> None: ...

    with pytest.raises(RegistrationError, match=rf"wrong\(.*write: def {stage.decorator}\(ctx: "):
        decorate(wrong)
    assert app.handlers[stage] == []


@pytest.mark.parametrize("stage", list(Stage))
def test_a_handler_without_parameters_is_refused(stage: Stage) -> None:
    with pytest.raises(RegistrationError, match="cannot be called with"):
        getattr(Milter("test"), stage.decorator)(lambda: None)


def test_default_values_star_arguments_methods_and_callables_are_fine() -> None:
    app = Milter("test")

    class Filter:
        def helo(self, ctx: Context, name: str, extra: int = 0) -> None: ...

        def __call__(self, ctx: Context, name: str) -> None: ...

    app.on_helo(Filter().helo)
    app.on_helo(Filter())
    app.on_helo(accept_anything)
    assert len(app.handlers[Stage.HELO]) == 3
    assert "Filter.helo" in app.handlers[Stage.HELO][0].name


@pytest.mark.parametrize("thing", [42, "on_helo", object()])
def test_what_is_no_function_is_refused(thing: Any) -> None:
    with pytest.raises(RegistrationError, match="must be a function"):
        Milter("test").on_helo(thing)


class Asynchronous:
    async def method(self, *arguments: Any) -> None: ...

    async def __call__(self, *arguments: Any) -> None: ...


async def coroutine_function(*arguments: Any) -> Status:
    return Status.CONTINUE


COROUTINE_FUNCTIONS = [
    coroutine_function,
    Asynchronous().method,
    Asynchronous(),
    functools.partial(coroutine_function),
    functools.partial(functools.partial(Asynchronous())),
]


@pytest.mark.parametrize("function", COROUTINE_FUNCTIONS)
def test_coroutine_functions_of_all_kinds_are_known_as_such(function: Any) -> None:
    app = Milter("test")
    app.on_helo(function)
    app.on_helo(accept_anything)
    assert [handler.asynchronous for handler in app.handlers[Stage.HELO]] == [True, False]


@pytest.mark.parametrize("function", COROUTINE_FUNCTIONS)
def test_a_negotiation_waits_for_nothing(function: Any) -> None:
    app = Milter("test")
    with pytest.raises(RegistrationError, match=r"on_negotiate takes plain functions only.*write: def on_negotiate\("):
        app.on_negotiate(function)
    assert app.handlers[Stage.NEGOTIATE] == []


def test_an_asynchronous_generator_is_refused() -> None:
    async def generator(ctx: Context, name: str) -> Any:
        yield Status.CONTINUE

    with pytest.raises(RegistrationError, match="is an asynchronous generator, since it has a yield"):
        Milter("test").on_helo(generator)


@pytest.mark.parametrize("seconds", [0, -1, 0.0, float("nan"), float("inf")])
def test_a_limit_of_time_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="handler_timeout must be more than 0 seconds, or None"):
        Milter("test", handler_timeout=seconds)


def test_decorating_gives_the_function_back() -> None:
    app = Milter("test")

    def helo(ctx: Context, name: str) -> Status:
        return Status.CONTINUE

    assert app.on_helo(helo) is helo
    assert app.on_helo(macros=["i"])(helo) is helo


def test_a_handler_annotated_with_none_observes_and_any_other_may_reply() -> None:
    app = Milter("test")

    @app.on_helo
    def observer(ctx: Context, name: str) -> None: ...

    @app.on_helo
    def quoted(ctx: Context, name: str) -> "None": ...

    @app.on_helo
    def optional(ctx: Context, name: str) -> Status | None: ...

    @app.on_helo
    def bare(ctx, name): ...  # type: ignore[no-untyped-def]

    assert [handler.observes for handler in app.handlers[Stage.HELO]] == [True, True, False, False]


def test_a_string_of_macros_and_macros_at_a_stage_without_them_are_refused() -> None:
    app = Milter("test")
    with pytest.raises(RegistrationError, match=r'macros=\["i"\]'):
        app.on_helo(macros="i")
    for stage in (Stage.NEGOTIATE, Stage.UNKNOWN, Stage.ABORT, Stage.CLOSE):
        with pytest.raises(RegistrationError, match="has no option macros"):
            getattr(app, stage.decorator)(macros=["i"])
    with pytest.raises(ValueError, match="not the name of a macro"):
        app.on_helo(macros=["a b"])


def test_include_adds_handlers_and_hooks_behind_ones_own() -> None:
    first, second = Milter("first"), Milter("second", on_error=Status.REJECT)
    first.on_helo(accept_anything)
    second.on_helo(observe_anything)
    second.on_start(lambda: None)
    second.on_stop(lambda: None)
    first.include(second)
    assert [handler.function for handler in first.handlers[Stage.HELO]] == [accept_anything, observe_anything]
    assert len(first.start_hooks) == len(first.stop_hooks) == 1
    assert first.on_error is Status.TEMPFAIL
    with pytest.raises(ValueError, match="itself"):
        first.include(first)


@pytest.mark.parametrize("policy", [Status.DISCARD, Status.SKIP, "explode", 4, None])
def test_a_policy_for_errors_that_loses_mail_or_is_none_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="on_error"):
        Milter("test", on_error=policy)


@pytest.mark.parametrize("policy", [Status.TEMPFAIL, Status.ACCEPT, Reply(451, "4.3.0", "later"), "shutdown"])
def test_policies_for_errors(policy: Any) -> None:
    assert Milter("test", on_error=policy).on_error == policy


def test_a_required_action_must_be_among_the_actions() -> None:
    with pytest.raises(ValueError, match="QUARANTINE"):
        Milter("test", actions=Actions.ADD_HEADER, requires=Actions.ADD_HEADER | Actions.QUARANTINE)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_filter_has_a_name_that_libmilter_can_log(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Milter(name)


def test_a_hook_takes_no_arguments() -> None:
    with pytest.raises(RegistrationError, match="def on_start"):
        Milter("test").on_start(accept_one)  # type: ignore[arg-type]


def accept_one(argument: object) -> None: ...


# ---- What the registry implies


def test_a_filter_without_handlers_declines_the_content_and_replies_to_nothing_but_the_end() -> None:
    options = make_plan(Milter("test")).options
    assert ProtocolOptions.NO_HEADER | ProtocolOptions.NO_EOH | ProtocolOptions.NO_BODY in options
    assert ProtocolOptions.NO_DATA | ProtocolOptions.NO_UNKNOWN in options
    assert ProtocolOptions.NOREPLY_CONNECT | ProtocolOptions.NOREPLY_RCPT in options
    for never in ("CONNECT", "HELO", "MAIL", "RCPT"):
        assert ProtocolOptions[f"NO_{never}"] not in options, "the conversation is remembered"


@pytest.mark.parametrize("stage", [stage for stage in HANDLED_STAGES if stage.value <= Stage.BODY.value])
def test_a_stage_replies_only_when_a_handler_may(stage: Stage) -> None:
    silent = ProtocolOptions[f"NOREPLY_{stage.name}"]
    observing, replying = Milter("observing"), Milter("replying", header_replies="each")
    getattr(observing, stage.decorator)(observe_anything)
    getattr(replying, stage.decorator)(observe_anything)
    getattr(replying, stage.decorator)(accept_anything)
    assert silent in make_plan(observing).options
    assert silent not in make_plan(replying).options
    assert ProtocolOptions[f"NO_{stage.name}"] not in make_plan(observing).options


def test_header_fields_are_answered_at_their_end() -> None:
    app = Milter("test")
    app.on_header(accept_anything)
    options = make_plan(app).options
    assert ProtocolOptions.NOREPLY_HEADER in options
    assert ProtocolOptions.NOREPLY_EOH not in options
    assert ProtocolOptions.NO_EOH not in options


def test_the_end_of_header_is_declined_only_together_with_the_header() -> None:
    app = Milter("test")
    app.on_header(observe_anything)
    assert ProtocolOptions.NO_EOH not in make_plan(app).options


def test_data_is_declined_only_together_with_unknown_commands() -> None:
    app = Milter("test")
    app.on_unknown(observe_anything)
    assert ProtocolOptions.NO_DATA not in make_plan(app).options


def test_skip_is_asked_for_when_a_handler_of_the_body_may_answer_it() -> None:
    app = Milter("test")
    app.on_body(observe_anything)
    assert ProtocolOptions.SKIP not in make_plan(app).options
    app.on_body(accept_anything)
    assert ProtocolOptions.SKIP in make_plan(app).options


def test_declared_macros_are_asked_for_with_the_usual_ones_and_one_that_is_always_defined() -> None:
    app = Milter("test")
    app.on_mail(macros=["{auth_authen}", "{client_addr}"])(accept_anything)
    app.on_header(macros=["nrcpts"])(accept_anything)
    requests = make_plan(app).requests({})
    assert set(requests) == {MacroList.MAIL, MacroList.DATA}
    assert requests[MacroList.MAIL][0] == "j"
    assert {"i", "{auth_type}", "{mail_addr}", "{client_addr}"} <= set(requests[MacroList.MAIL])
    assert requests[MacroList.MAIL].count("{auth_authen}") == 1
    assert "{nrcpts}" in requests[MacroList.DATA]


def test_nothing_is_asked_for_where_nothing_was_declared_so_the_mta_keeps_its_configuration() -> None:
    app = Milter("test")
    app.on_mail(accept_anything)
    assert make_plan(app).requests({}) == {}


def test_an_eom_handler_gets_a_context_with_actions() -> None:
    app = Milter("test")

    @app.on_eom
    def eom(ctx: EomContext) -> None:
        ctx.add_header("X", "y")

    assert app.handlers[Stage.EOM][0].function is eom


def test_a_negative_spool_size_is_refused() -> None:
    with pytest.raises(ValueError, match="spool_size must be 0 or more bytes, not -1"):
        Milter("test", spool_size=-1)
