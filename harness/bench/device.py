"""What a device is and how it is doing: its fingerprint, its clocks, temperature and throttling.

Read, never set. On NVIDIA devices through NVML (`nvidia-ml-py`, optional; without it through
`nvidia-smi`, where there is one). Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DeviceReader",
    "fingerprint",
    "peak_bytes",
    "reset_peak",
    "software",
    "throttle_reasons",
]

#: Bits of `nvmlDeviceGetCurrentClocksEventReasons` (NVML API reference, "clocks event reasons").
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
# The newer name first; drivers and their tools know one of them, or both.
_REASONS_CALLS = (
    "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons",
)  # fmt: skip
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_FIELDS = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "temperature_c",
    "power.draw": "power_w", "enforced.power.limit": "power_limit_w",
}  # fmt: skip
#: Reasons that say nothing against a measurement.
_HARMLESS = frozenset({"idle", "application clocks", "sync boost", "display clocks"})


def throttle_reasons(bits: int) -> list[str]:
    """The names of NVML's clocks event reasons that slow a device down; unknown bits in hex."""
    known = sum(_REASONS)
    named = [name for bit, name in _REASONS.items() if bits & bit and name not in _HARMLESS]
    return named + ([hex(bits & ~known)] if bits & ~known else [])


def fingerprint(device: str) -> dict[str, Any]:
    """What must be the same for two measurements to be compared: the hardware, not the software."""
    chosen = torch.device(device)
    found: dict[str, Any] = {"kind": chosen.type}
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    else:
        found["threads"] = torch.get_num_threads()
    # The host launches every kernel: it is part of what is measured on CUDA too.
    return found | {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "architecture": platform.machine(),
    }


def software(device: str) -> dict[str, Any]:
    """Versions that a measurement depends on; a difference is said, and forbids no comparison."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "lora-stack-harness"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.device(device).type == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["driver"] = DeviceReader(device).driver
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def reset_peak(device: str) -> None:
    """Start counting the highest memory use anew."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
        return
    with contextlib.suppress(OSError):  # a Linux of its own right; elsewhere the peak only grows
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int:
    """The highest memory use since `reset_peak`: allocated by torch on CUDA, resident elsewhere."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return int(torch.cuda.max_memory_allocated(chosen))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class DeviceReader:
    """Reads one NVIDIA device's state; for any other device, and where NVML is absent, nothing.

    The device is found by its UUID: NVML's numbering ignores `CUDA_VISIBLE_DEVICES`.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._uuid = ""
        self._fields: tuple[str, ...] = ()
        self.driver: str | None = None
        self.source = "none"
        chosen = torch.device(device)
        if chosen.type != "cuda" or torch.version.cuda is None:
            return
        identity = str(getattr(torch.cuda.get_device_properties(chosen), "uuid", ""))
        self._uuid = identity if identity.startswith(("GPU-", "MIG-")) else f"GPU-{identity}"
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            try:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid.encode())
            except pynvml.NVMLError:  # torch tells a slice of a device by its bare number too
                slice_ = self._uuid.replace("GPU-", "MIG-", 1)
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(slice_.encode())
            driver = pynvml.nvmlSystemGetDriverVersion()
            self.driver = driver.decode() if isinstance(driver, bytes) else str(driver)
            self.source = "nvml"
        except Exception:  # NVML raises a class a fault, and a missing library raises another
            self._nvml = self._handle = None
            self.driver = self._smi("driver_version").get("driver_version")
            self.source = "nvidia-smi" if self.driver else "none"
            self._fields = self._known_fields() if self.driver else ()

    def read(self) -> Mapping[str, Any] | None:
        """Clocks in MHz, temperature in °C, power in W, and what slows the device down; a value
        that the device does not tell is left out. None where there is nobody to ask."""
        if self._handle is not None:
            return self._read_nvml()
        if self.source == "nvidia-smi":
            return self._read_smi()
        return None

    def _read_nvml(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle

        def reasons() -> int:
            for name in _REASONS_CALLS:
                with contextlib.suppress(Exception):  # unknown to the bindings, or to the driver
                    return int(getattr(nvml, name)(handle))
            raise LookupError

        questions: dict[str, Any] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "throttle": lambda: throttle_reasons(reasons()),
        }
        found: dict[str, Any] = {}
        for name, question in questions.items():
            # Virtual and MIG devices do not answer all of them.
            with contextlib.suppress(Exception):
                found[name] = question()
        return found

    def _known_fields(self) -> tuple[str, ...]:
        """What `nvidia-smi` answers here: one name that it does not know spoils the whole answer,
        and asking takes it long enough to ask once."""
        for reasons in (*((name,) for name in _REASONS_FIELDS), ()):
            if self._smi(*_FIELDS, *reasons):
                return (*_FIELDS, *reasons)
        return ()

    def _read_smi(self) -> dict[str, Any] | None:
        answers = self._smi(*self._fields) if self._fields else {}
        found: dict[str, Any] = {}
        for asked, name in _FIELDS.items():
            with contextlib.suppress(ValueError, KeyError):
                found[name] = float(answers[asked])
        for asked in _REASONS_FIELDS:
            with contextlib.suppress(ValueError, KeyError):
                found["throttle"] = throttle_reasons(int(answers[asked], 16))
        return found or None

    def _smi(self, *fields: str) -> dict[str, str]:
        command = [
            "nvidia-smi", "-i", self._uuid, f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        values = [value.strip() for value in done.stdout.strip().split(",")]
        return dict(zip(fields, values, strict=False)) if len(values) == len(fields) else {}
