import os
import signal
import threading

import pytest

from moerouters.lab.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_a_later_one_an_order(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = signal.getsignal(number), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        assert (stop.signal, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.signal, stop.exit_code) == (number, 128 + number)
        now[0] += 0.5  # an echo of the first
        os.kill(os.getpid(), number)
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_leave_signals_alone() -> None:
    before, during = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with StopRequest():
            during.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]
