"""One arm in a process of its own, and the parent's end of the pipe to it.

Arms must not share a process (torch's and XLA's threads disturb each other) and must
not run at the same time. So every arm sits in a child that waits, blocked in a read,
for a line that says how many steps to run, and answers with their times.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from experiments.bench.setting import Arm, Setting
from lowrank.core.errors import LowrankError
from lowrank.core.memory import SWITCH
from lowrank.core.spec import plain

#: What a child process runs.
MODULE = "experiments.bench.child"
ARMS = ("lora", "by_hand", "by_autodiff", "peft", "peft_huge", "full")
#: Those of `bench.decoder`.
DECODERS = ("decoder", "decoder_peft", "speaker", "speaker_peft")
#: Those of `bench.gpu`, besides.
SHAPED = ("decoder_peft_compiled", "product")
#: Others' programs, which run as their users run them.
OTHERS = ("peft", "decoder_peft", "decoder_peft_compiled", "speaker_peft")


def build(arm: str, setting: Setting) -> Arm:
    """Makes an arm; imports what it needs and nothing else."""
    if arm in (*DECODERS, *SHAPED):
        return _decoder(arm, setting)
    if arm.startswith("peft"):
        from experiments.bench.peers import Peft

        return Peft(setting)
    from experiments.bench import handwritten, ours
    from lowrank.io import hub

    makers = {
        "lora": ours.lora,
        "full": ours.full,
        "by_hand": handwritten.by_hand,
        "by_autodiff": handwritten.by_autodiff,
    }
    base = hub.load(setting.base, num_classes=setting.num_classes)
    # No arm reads text, and the one on torch holds no tokenizer either.
    object.__setattr__(base, "tokenizer", None)
    return makers[arm](setting, base)


def _decoder(arm: str, setting: Setting) -> Arm:
    if "_peft" in arm:
        from experiments.bench import peer_decoders as peers

        return {
            "decoder_peft": peers.PeftDecoder,
            "decoder_peft_compiled": peers.CompiledPeftDecoder,
            "speaker_peft": peers.PeftSpeaker,
        }[arm](setting)
    from experiments.bench import decoders
    from lowrank.io import language

    if arm == "product":
        return decoders.Product(setting)
    base = decoders.drawn(setting) if setting.model else language.load(setting.base)
    return {"decoder": decoders.Decoder, "speaker": decoders.Speaker}[arm](
        setting, base
    )


def serve(arm: Arm, commands: TextIO, answers: TextIO) -> None:
    """Runs steps as told until the commands end; one JSON line per answer."""
    cpu = time.process_time()
    for line in commands:
        idle = time.process_time() - cpu
        wanted = json.loads(line)
        if wanted.get("flops"):
            count = arm.facts["flops"]
            reply: dict[str, Any] = {"flops": count() if callable(count) else count}
        else:
            reply = {**timed(arm, wanted["steps"]), "idle_cpu_seconds": idle}
        # An accelerator has a memory of its own.
        peak = getattr(arm, "peak_bytes", peak_bytes)
        tell(answers, {**reply, "peak_bytes": peak()})
        cpu = time.process_time()


def timed(arm: Arm, num_steps: int) -> dict[str, list[float]]:
    """Seconds and loss of each of `num_steps` steps."""
    seconds, losses = [], []
    for _ in range(num_steps):
        began = time.perf_counter()
        losses.append(arm.step())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses}


def tell(answers: TextIO, reply: Mapping[str, Any]) -> None:
    """Writes one answer."""
    answers.write(json.dumps(reply) + "\n")
    answers.flush()


def peak_bytes() -> int | None:
    """The most memory this program has held; None where the system does not tell.

    Not `ru_maxrss`: a child inherits that from the process that started it, so a
    light program under a heavy parent would look heavy.
    """
    try:
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status if ":" in line)
    except OSError:
        return None
    return int(lines["VmHWM"].split()[0]) * 1024


class Child:
    """A running arm.

    Attributes:
      arm: Its name.
      first_step_seconds: From the command to the end of the first step: imports,
        weights, attaching, compiling, one step.
      first_loss: Loss of that step.
      facts: As the arm tells them.
    """

    def __init__(
        self, arm: str, setting: Setting, environment: Mapping[str, str] | None = None
    ):
        """Starts the process and waits for its first step."""
        self.arm = arm
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, arm, json.dumps(plain(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                SWITCH: "0" if arm in OTHERS else "1",
                **(environment or {}),
            },
        )
        ready = self._answer()
        self.first_step_seconds = time.perf_counter() - began
        self.first_loss = ready["loss"]
        self.facts = ready["facts"]

    def run(self, num_steps: int) -> dict[str, Any]:
        """Runs steps; their seconds and losses, and the peak memory so far."""
        return self._ask({"steps": num_steps})

    def flops(self) -> float | None:
        """FLOPs of a step; None for an arm that cannot count them."""
        return self._ask({"flops": True})["flops"]

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        pipe: Any = self._process.stdin
        try:
            tell(pipe, command)
        except BrokenPipeError:
            self._ended()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._ended()
        return json.loads(line)

    def _ended(self) -> None:
        code = self._process.wait()
        raise LowrankError(
            f"bench: the arm {self.arm!r} ended with exit code {code}; what it said is "
            "above. A negative code is a signal, -9 most often a lack of memory."
        )

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main(arguments: Sequence[str]) -> None:
    """The child's side: ARM SETTING."""
    arm, text = arguments
    fields = json.loads(text)
    fields.pop("name")
    setting = Setting(**fields)
    if hasattr(os, "sched_setaffinity"):
        # XLA has as many threads as cores it may use; torch is told by itself.
        cores = sorted(os.sched_getaffinity(0))[: setting.num_threads]
        os.sched_setaffinity(0, cores)
    # Libraries print; the answers keep the real standard output for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    built = build(arm, setting)
    loss = built.step()
    facts = {name: fact for name, fact in built.facts.items() if name != "flops"}
    tell(answers, {"loss": loss, "facts": facts})
    serve(built, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
