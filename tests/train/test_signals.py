import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxlm.train.signals import Agreement, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        agreement = Agreement(stop)
        assert not agreement.reached()
        os.kill(os.getpid(), number)
        assert stop.requested
        assert agreement.reached()
        assert stop.signal == number.name
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert f"{number.name}: saving after this step" in capfd.readouterr().err


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_after_a_termination_still_saves():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_other_threads_are_refused():
    errors = []

    def enter():
        try:
            with stop_on_signals():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_two_processes_stop_after_the_same_step_when_one_gets_the_signal():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = """
        import os, signal, sys
        import jax
        from jaxlm.train.signals import Agreement, stop_on_signals
        rank = int(sys.argv[1])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, rank)
        with stop_on_signals() as stop:
            agreement = Agreement(stop, every_steps=3)
            for step in range(100):
                if (rank, step) == (1, 7):
                    os.kill(os.getpid(), signal.SIGTERM)
                if agreement.reached():
                    break
            print("stopped at", step)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    # Asked at the steps 2, 5, 8, ... and read a round later: the flag of step 7 is asked for at 8 and read at 11.
    assert ["stopped at 11" in output for output in outputs] == [True, True], "\n".join(outputs)
