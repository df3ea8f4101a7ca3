"""SIGINT and SIGTERM end a stage between two pieces of work, whatever the stage is."""

import os
import signal
import sys
import threading

import pytest

from tcsae.shared.base.errors import Stopped
from tcsae.shared.base.signals import STOPPING, StopRequest, stop_on_signals
from tcsae.shared.commands import group


def in_pieces(n: int, number: int, at: int) -> list[int]:
    """Pieces done of `n`, one of which a signal meets in its middle; then what `check` raises."""
    done: list[int] = []
    with stop_on_signals() as stop:
        for piece in range(n):
            if piece == at:
                os.kill(os.getpid(), number)
            done.append(piece)
            stop.check(f"{len(done)} pieces are on disk")
    return done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_piece_at_hand_is_finished_then_the_stage_ends(number, code, capfd):
    with pytest.raises(Stopped, match=r": 3 pieces are on disk\. The same command goes on") as stopped:
        in_pieces(9, number, at=2)
    assert stopped.value.exit_code == code
    assert "Stopping after the piece of work at hand" in capfd.readouterr().err


def test_a_second_interrupt_ends_at_once_a_second_sigterm_does_not():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("ending", [None, RuntimeError], ids=["finished", "failed"])
def test_signals_are_handled_as_before_afterwards(ending):
    before = [signal.getsignal(number) for number in STOPPING]
    try:
        with stop_on_signals() as stop:
            assert not stop.requested
            assert [signal.getsignal(number) for number in STOPPING] != before
            if ending:
                raise ending
    except RuntimeError:
        pass
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_closed_stderr_is_no_reason_to_fail():
    saved = os.dup(2)
    try:
        os.close(2)
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_outside_the_main_thread_and_without_a_handler_nothing_stops():
    StopRequest().check("nothing")
    requests = []

    def work() -> None:
        with stop_on_signals() as stop:
            requests.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requests == [False]


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_ctrl_c_before_a_command_begins_is_a_line_and_130(ignored, capfd):
    """While arguments are parsed, say, where click would make it "Aborted!" with exit code 1."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(group.cli, "parse_args", lambda *_: os.kill(os.getpid(), signal.SIGINT) or sys.exit(0))
                group.main()
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if ignored else 130)
    assert ("Interrupted. The same command goes on" in capfd.readouterr().err) is not ignored
