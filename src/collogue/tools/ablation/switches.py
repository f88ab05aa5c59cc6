"""The switches: each changes one choice, by edits of the kernel sources, compiler options or the launch.

``base`` is the kernels as they are. An edit names a text that must stand once in its file, so a switch that no longer fits the kernels
is an error and not a measurement of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from collogue.errors import FormatError
from collogue.planning.architecture import ARCHITECTURES, COVERED
from collogue.testing.emulator import Edit

#: Architectures with the E2M1 conversion in hardware, and without.
HARDWARE = tuple(name for name in COVERED if ARCHITECTURES[name].has_e2m1)
SOFTWARE = tuple(name for name in COVERED if not ARCHITECTURES[name].has_e2m1)
_CLUSTERS = tuple(name for name in COVERED if ARCHITECTURES[name].has_clusters)


@dataclass(frozen=True)
class Switch:
    """One choice changed.

    ``options``: of the compiler. ``threads``: widest CTA of a launch. ``cluster``: maximum number of CTAs of a row, if plans take fewer.
    ``dependent``: whether the next kernel may be launched early (PDL).
    ``valid``: whether outputs are meant to be right; where not, the switch only shows what something costs.
    ``formats``: where the choice matters, by the first part of the label; empty: everywhere.
    """

    name: str
    what: str
    edits: tuple[Edit, ...] = ()
    options: dict[str, bool] = field(default_factory=dict)
    threads: int | None = None
    cluster: int = 0
    dependent: bool = True
    valid: bool = True
    formats: tuple[str, ...] = ()
    architectures: tuple[str, ...] = COVERED

    def applies(self, format: str, architecture: str) -> bool:
        """Whether the switch changes anything there."""
        return architecture in self.architectures and (not self.formats or format.split("/")[0] in self.formats)


_FACTOR = "    float factor = from_bits(load_shared_word(factors + (sf & 0x7fu) * 4));\n"
_BY_WORD = """#pragma unroll
  for (int i = 0; i < 8; i++) c[i] = e2m1_biased(n[i] * factor);
#pragma unroll
  for (int i = 0; i < 8; i += 2) c[i] += c[i + 1] << 4;
  c[0] += c[2] << 8;
  c[4] += c[6] << 8;
  return join_signs(c[0] + (c[4] << 16) - 298u * 0x11111111u, sign_bits);
"""
_BY_PAIR = """  u32 w = 0;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    c[i] = e2m1_biased(n[i] * factor) - 298u;
    c[i + 1] = e2m1_biased(n[i + 1] * factor) - 298u;
    w |= (c[i] | (c[i + 1] << 4)) << (4 * i);
  }
  return join_signs(w, sign_bits);
"""
_HARDWARE_BY_PAIR = "  for (int i = 0; i < 4; i++) w |= e2m1_pair(n[2 * i] * factor, n[2 * i + 1] * factor) << (8 * i);\n"
_ADD = """        if (first + b == 0)
          begin<D>(sum, term[b]);
        else if (first + b < C::kWorld)
          add<D>(sum, term[b]);
"""
_REPORT = "    if (ranks.stopped) ranks.report();\n"
_LAUNCH_NEXT = "    if constexpr (!C::kLaunchLate) launch_next_kernel();\n"

_TWO_RECIPROCALS = Edit(
    "formats/nvfp4.cuh", _FACTOR, "    float factor = sf & 0x7fu ? reciprocal(e4m3_value(sf & 0x7fu) * reciprocal(scale)) : 0.0f;\n"
)
_PAIRS = Edit("encode.cuh", _BY_WORD, _BY_PAIR)
_WHOLE = (
    Edit("encode.cuh", _HARDWARE_BY_PAIR, "  if (true) w = e2m1_eight(n, factor);\n"),
    Edit(
        "ptx.cuh",
        "// Two codes in the low 8 bits, `low` in bits 0 to 3. Saturating; keeps the sign of zero.\n",
        """// Eight codes in one block of instructions.
COLLOGUE_DEVICE u32 e2m1_eight(const float (&n)[8], float f) {
  u32 r;
  asm("{.reg .b8 a, b, c, d;"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5; cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;"
      "mov.b32 %0, {a, b, c, d};}"
      : "=r"(r)
      : "f"(n[0] * f), "f"(n[1] * f), "f"(n[2] * f), "f"(n[3] * f), "f"(n[4] * f), "f"(n[5] * f), "f"(n[6] * f), "f"(n[7] * f));
  return r;
}
// Two codes in the low 8 bits, `low` in bits 0 to 3. Saturating; keeps the sign of zero.
""",
    ),
)
_BY_ELEMENT = Edit(
    "protocol.cuh",
    f"#pragma unroll\n      for (int b = 0; b < kBatch; b++) {{\n{_ADD}      }}\n",
    """      float wide[kBatch][8];
#pragma unroll
      for (int b = 0; b < kBatch; b++) D::widen(term[b], wide[b]);
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          if (first + b == 0)
            sum[j] = wide[b][j];
          else if (first + b < C::kWorld)
            sum[j] = sum[j] + wide[b][j];
        }
""",
)

_LATE = (
    Edit(
        "one_shot.cuh",
        "  compute_now(slot_offset ^ source.digest() ^ folded(residual) ^ ranks.digest(), shared.digest);\n",
        "",
    ),
)
_NO_BOUND = (
    Edit(
        "protocol.cuh",
        "      for (u32 polls = 0; waiting && polls < kPollsBetweenLooks; polls++) waiting = any_in_warp(missing());\n",
        "      while (waiting) waiting = any_in_warp(missing());\n",
    ),
    Edit("protocol.cuh", "      if (look) {\n", "      if (false) {\n"),
    Edit("protocol.cuh", "    stopped = head.w[2];\n", "    stopped = 0;\n"),
    Edit("protocol.cuh", "    if (!active || stopped || offset >= p.slot_bytes) return;\n", "    if (!active) return;\n"),
    Edit("opening.cuh", _REPORT, ""),
)
_NO_MARKS = (
    Edit("protocol.cuh", "    if (stopped) return;\n    const Words entry[2]", "    if (true) return;\n    const Words entry[2]"),
    Edit("protocol.cuh", "if (call != 0 && !stopped) compare_marks(call - 1, seen, kStagePrevious);", "(void)seen;"),
    Edit("opening.cuh", "    if (first_warp) seen = ranks.look_at_marks(ranks.call - 1);\n", ""),
)

#: The first vector of a CTA leaves last, behind a fence, and stands for all that the CTA has sent. Nothing else is compared.
_FLAG = (
    Edit(
        "one_shot.cuh",
        "      ranks.send(x[i], slot_offset + i * row.kVectorStep, row.active(i));\n    }\n",
        """      ranks.send(x[i], slot_offset + i * row.kVectorStep, row.active(i) && (i > 0 || thread_index() > 0));
    }
    sync_block();
    if (thread_index() == 0) {
      fence_system();
      ranks.send(x[0], slot_offset, true);
    }
""",
    ),
    Edit(
        "one_shot.cuh",
        "    const u8* place = ranks.slots() + slot_offset;\n",
        """    const u8* place = ranks.slots() + slot_offset;
    if (thread_index() < 32) ranks.wait_for_flags(slot_offset - thread_index() * static_cast<u32>(sizeof(Vector)), t);
    if (thread_index() == 0) fence_system();
    sync_block();
""",
    ),
    Edit(
        "protocol.cuh",
        "  // Adds every rank's term of one vector in rank order",
        """  // The vectors at `offset` that peers send last. A whole warp.
  COLLOGUE_DEVICE void wait_for_flags(u32 offset, u32 token) {
    const auto late_rank = [&] {
      u32 rank = kNobody;
#pragma unroll
      for (u32 k = 0; k < C::kWorld; k++)
        if (k != p.rank && is_missing(load_arrived(arrivals(k) + offset))) rank = k;
      return rank;
    };
    wait([&] { return late_rank() != kNobody; }, late_rank, kStagePartials, token);
  }

  // Adds every rank's term of one vector in rank order""",
    ),
    Edit("protocol.cuh", "            return is_missing(term);\n", "            return false;\n"),
    Edit("protocol.cuh", "              missing |= is_missing(term[b]);\n", ""),
)

SWITCHES: tuple[Switch, ...] = (
    Switch("base", "the kernels as they are"),
    Switch("base again", "the baseline repeated: its difference is the noise"),
    # ---- conversion, scale, accumulation, block size
    Switch("e2m1 pairs", "E2M1 by integers in pairs, not eight at a time", (_PAIRS,), formats=("nvfp4", "mxfp4"), architectures=SOFTWARE),
    Switch("e2m1 whole", "eight E2M1 conversions in one block of asm", _WHOLE, formats=("nvfp4", "mxfp4"), architectures=HARDWARE),
    Switch(
        "scale division",
        "g / sf by a division in every block of 16, not from a table",
        (Edit("formats/nvfp4.cuh", _FACTOR, "    float factor = sf & 0x7fu ? scale / e4m3_value(sf & 0x7fu) : 0.0f;\n"),),
        formats=("nvfp4",),
    ),
    Switch("scale reciprocals", "1 / (sf * (1 / g)): two correctly rounded reciprocals", (_TWO_RECIPROCALS,), formats=("nvfp4",)),
    Switch("add by element", "all terms widened into an array, then each element summed over the ranks", (_BY_ELEMENT,)),
    Switch(
        "64 threads",
        "CTAs of 64 threads: 14 to a row, and a cluster larger than every GPU must accept",
        threads=64,
        cluster=16,
        architectures=("sm_90a", "sm_100a", "sm_103a"),
    ),
    Switch("128 threads", "CTAs of 128 threads, regardless of the plan", threads=128, architectures=_CLUSTERS),
    Switch("160 threads", "CTAs of 160 threads", threads=160, architectures=_CLUSTERS),
    Switch("192 threads", "CTAs of 192 threads", threads=192, architectures=_CLUSTERS),
    Switch("256 threads", "CTAs of 256 threads", threads=256, architectures=_CLUSTERS),
    Switch("512 threads", "CTAs of 512 threads", threads=512, architectures=_CLUSTERS),
    Switch("whole row", "a row in one CTA of up to 1024 threads, no cluster", threads=1024, architectures=_CLUSTERS),
    Switch(
        "together",
        "scale reciprocals, add by element and, where E2M1 is encoded by integers, pairs",
        (_TWO_RECIPROCALS, _BY_ELEMENT, _PAIRS),
        formats=("nvfp4",),
    ),
    # ---- what the architecture and the compiler give
    Switch(
        "software e2m1",
        "E2M1 by integers although the hardware converts",
        (Edit("ptx.cuh", "#define COLLOGUE_HAS_E2M1_CONVERSION (__CUDA_ARCH__ >= 1000)", "#define COLLOGUE_HAS_E2M1_CONVERSION 0"),),
        formats=("nvfp4", "mxfp4"),
        architectures=HARDWARE,
    ),
    Switch(
        "software e4m3",
        "E4M3 by integers although the hardware converts",
        (Edit("ptx.cuh", "#define COLLOGUE_HAS_E4M3_CONVERSION (__CUDA_ARCH__ >= 890)", "#define COLLOGUE_HAS_E4M3_CONVERSION 0"),),
        formats=("nvfp4", "mxfp8", "fp8_static", "fp8_per_token", "fp8_group128"),
        architectures=_CLUSTERS,
    ),
    Switch("fma", "the compiler may contract a product and a sum", options={"fma": True}),
    Switch(
        "fast math",
        "contraction, flush to zero, approximate division and root",
        options={"fma": True, "ftz": True, "prec_div": False, "prec_sqrt": False},
    ),
    # ---- launch and protocol
    Switch("pdl off", "the next kernel starts when this one has ended", dependent=False, architectures=_CLUSTERS),
    Switch(
        "pdl late",
        "dependents launched at the end of the kernel",
        (
            Edit("opening.cuh", _LAUNCH_NEXT, ""),
            Edit("opening.cuh", _REPORT, f"    launch_next_kernel();\n{_REPORT}"),
        ),
        architectures=_CLUSTERS,
    ),
    Switch(
        "pdl early",
        "dependents launched before the inputs are loaded",
        (
            Edit("opening.cuh", _LAUNCH_NEXT, ""),
            Edit("opening.cuh", "    wait_for_previous_kernel();\n", "    wait_for_previous_kernel();\n    launch_next_kernel();\n"),
        ),
        architectures=_CLUSTERS,
    ),
    Switch(
        "wipe off",
        "slots are not made clean again: later calls take old words",
        (Edit("opening.cuh", "    ranks.clean(thread, threads);\n", ""),),
        valid=False,
    ),
    Switch("flag", "a word of each CTA behind a fence says that all have come; the others are loaded then, not polled", _FLAG),
    Switch("no bound", "one-shot without timeout check: no clock, abort flag, failure record or bound on stores to peers", _NO_BOUND),
    Switch("no marks", "one-shot without call signatures and journal", _NO_MARKS),
    Switch("unguarded", "no timeout check, no call signatures", (*_NO_BOUND, *_NO_MARKS)),
    Switch("late addresses", "the assembler works out addresses when it likes: behind the wait for the kernel before", _LATE),
    Switch(
        "nothing kept",
        "constants and indices are read where they are used, not kept in registers",
        (Edit("exchange.cuh", "if constexpr (C::kVectors == 1 && !C::kLoop) return keep(x);", ""),),
    ),
    Switch(
        "no first wait", "polling starts at once after the sends", (Edit("protocol.cuh", "- sent_at < C::kFirstPoll", "- sent_at < 0u"),)
    ),
)


def chosen(names: Sequence[str] | None) -> list[Switch]:
    """Switches by name, with ``base`` in front; all of them for ``None``. Raises :class:`FormatError` for a name there is not."""
    known = {switch.name: switch for switch in SWITCHES}
    for name in names or ():
        if name not in known:
            raise FormatError(f"unknown switch {name!r}", hint=f"choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(("base", *names))] if names is not None else list(SWITCHES)
