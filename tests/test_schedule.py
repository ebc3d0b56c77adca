"""The launch policy of attention (csrc/kernels/attention/schedule.h): what is chosen, and what holds of all choices.

No GPU is needed: the policy is plain C++, which a small program asks here.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from backends import KERNELS

PROGRAM = r"""
#include <cstdio>
#include <initializer_list>
#include <set>

#include "attention/schedule.h"

using namespace kvc;

// What a schedule says, and then how many key tiles no team of warps of a unit takes, or several take.
void print(const Schedule& s, const Gpu& gpu, int64_t key_tiles, int64_t groups, bool in_turns,
           int64_t partial_floats) {
  int64_t wrong = 0;
  for (int64_t tile = 0; tile < key_tiles; ++tile) {
    int taken = 0;
    for (uint32_t split = 0; split < s.splits; ++split) {
      if (!in_turns) {
        const int32_t tiles = static_cast<int32_t>(key_tiles);
        taken += tile >= first_tile_of(tiles, split, s.splits) && tile < first_tile_of(tiles, split + 1, s.splits);
        continue;
      }
      for (uint32_t group = 0; group < groups; ++group) {
        const TileTurns turns = TileTurns::of(split, s.splits, group, groups);
        taken += tile >= turns.first && (tile - turns.first) % turns.stride == 0;
      }
    }
    wrong += taken != 1;
  }
  print_if_asked(s, gpu);
  std::printf("%s %s %lld %lld %lld %lld %lld %lld %lld\n", s.kernel, s.config, (long long)s.units,
              (long long)s.splits, (long long)s.blocks, (long long)s.threads, (long long)s.shared_bytes,
              (long long)partial_floats, (long long)wrong);
}

// How many tickets of groups are those of others too, or are none, if every unit holds as much as it likes.
int64_t shared_tickets(const Schedule& s, uint32_t partial_floats) {
  if (s.units > kAttendTickets) return s.splits > 1;
  std::set<uint32_t> taken;
  for (uint32_t unit = 0; unit < s.units; ++unit) taken.insert(unit);
  int64_t wrong = 0;
  for (uint32_t unit = 0; unit < s.units; ++unit) {
    const uint32_t splits = 1 + unit * 7 % s.splits;
    const uint32_t each = merged_together(splits, s.units, partial_floats);
    for (uint32_t group = 0; each < splits && group * each < splits; ++group) {
      const uint32_t ticket = ticket_of_group(s.units, unit, group);
      wrong += !taken.insert(ticket).second || ticket >= kAttendTickets;
    }
  }
  return wrong;
}

// What few_queries.cu makes of a schedule where the cache holds fewer rows: how many numbers of splits and tickets are
// wrong.
template <typename Block>
int64_t wrong_with_fewer(const FewQueriesSchedule& s, int64_t positions) {
  int64_t wrong = 0;
  for (const int64_t held : {int64_t{0}, int64_t{1}, int64_t{100}, positions / 3, positions}) {
    const uint32_t turns = blocks_for(held, s.teams * Block::kTileRows);
    const uint32_t splits = useful_splits<Block>(turns, FastDivider::by(static_cast<uint32_t>(s.splits)), s.most_each);
    wrong += splits < 1 || splits > s.splits || splits > (turns > 1 ? turns : 1);
  }
  return wrong + shared_tickets(s, kPartialFloats<Block::kWidth, Block::kQueries>);
}

int main() {
  long long sms, shared, major, entries, heads, group, tokens, positions, floats;
  while (std::scanf("%lld %lld %lld %lld %lld %lld %lld %lld %lld", &sms, &shared, &major, &entries, &heads, &group,
                    &tokens, &positions, &floats) == 9) {
    const Gpu gpu{sms, shared, (int)major};
    const AttendShape shape{entries, heads, group, tokens, positions, floats};
    const auto tiles = [&](int64_t rows) { return blocks_for(positions < 4096 ? positions : 4096, rows); };
    if (is_for_many(tokens, group)) {
      using Portable = ManyQueriesShape<ManyQueries128>;
      const Schedule s = major == 9 ? schedule_many_queries<Sm90Shape<Sm90Queries128<2>>>(shape, gpu, "sm90", true)
                                    : schedule_many_queries<Portable>(shape, gpu, "many", false);
      const int64_t queries = major == 9 ? Sm90Shape<Sm90Queries128<2>>::kQueries : Portable::kQueries;
      print(s, gpu, tiles(64), 1, false, queries * (128 + 2));
    } else if (is_one_query(shape, 128)) {
      const Schedule s = schedule_one_query<16>(shape, gpu);
      print(s, gpu, tiles(OneQueryBlock<16>::kStep), s.threads / 32, true, kPartialFloats<128, 1>);
    } else {
      const FewQueriesSchedule s = schedule_few_queries<8>(shape, gpu);
      const bool four = s.which == FewQueriesConfig::four_large || s.which == FewQueriesConfig::four_small;
      const bool sixteen = s.which == FewQueriesConfig::sixteen;
      const int64_t queries = four ? 4 : sixteen ? 16 : 8;
      const int64_t wrong = sixteen ? wrong_with_fewer<FewQueriesBlock<8, SixteenQueries>>(s, positions)
                            : four  ? wrong_with_fewer<FewQueriesBlock<8, FourQueriesLarge>>(s, positions)
                                    : wrong_with_fewer<FewQueriesBlock<8, EightQueriesLarge>>(s, positions);
      if (wrong != 0) return 1;
      print(s, gpu, tiles(sixteen ? FewQueriesBlock<8, SixteenQueries>::kTileRows : 16), s.teams, true,
            queries * 128 + 2 * queries);
    }
  }
}
"""

H200 = (132, 232448, 9)
A100 = (108, 166912, 8)
RTX_3090 = (84, 101376, 8)  # sm_86, with 84 of its kind's multiprocessors
SMALL = (40, 101376, 8)
HEADS, HEAD_DIM = 8, 128


@dataclass(frozen=True)
class Call:
    """A GPU and the shape of a call; 8 KV heads of 128."""

    gpu: tuple[int, int, int]
    entries: int
    group: int
    positions: int
    tokens: int = 1

    @property
    def partial_floats(self) -> int:
        """The workspace's room for partials, as kvcache_ext/memory.py plans it."""
        return 128 * self.gpu[0] * (HEAD_DIM + 2)

    @property
    def line(self) -> str:
        shape = (self.entries, HEADS, self.group, self.tokens, self.positions, self.partial_floats)
        return " ".join(map(str, (*self.gpu, *shape)))


@dataclass(frozen=True)
class Chosen:
    kernel: str
    config: str
    units: int
    splits: int
    blocks: int
    threads: int
    shared_bytes: int
    partial_floats: int
    wrong_tiles: int


def compile_program(source: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}", str(source)]
    subprocess.run([*command, "-o", str(source.with_suffix(""))], check=True)
    return source.with_suffix("")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("schedule") / "schedule.cpp"
    source.write_text(PROGRAM)
    return compile_program(source)


def ask(program: Path, calls: list[Call], printing: str = "") -> subprocess.CompletedProcess[str]:
    lines = "\n".join(call.line for call in calls)
    environment = os.environ | {"KVCACHE_EXT_PRINT_SCHEDULE": printing}
    return subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True, env=environment)


def chosen_for(program: Path, calls: list[Call]) -> list[Chosen]:
    answer = ask(program, calls)
    words = [line.split() for line in answer.stdout.splitlines()]
    assert len(words) == len(calls)
    return [Chosen(kernel, config, *map(int, numbers)) for kernel, config, *numbers in words]


# What is chosen: configuration, splits, blocks, threads. A change of the policy changes these on purpose, with a
# measurement in docs/performance-log-attention.md.
PINNED = {
    Call(H200, 1, 1, 4096): ("EightWarps", 33, 264, 256),
    Call(H200, 8, 1, 1024): ("EightWarps", 4, 256, 256),
    Call(H200, 64, 1, 131072): ("FourWarps", 1, 512, 128),
    Call(A100, 8, 1, 4096): ("EightWarps", 3, 192, 256),
    Call(SMALL, 64, 1, 4096): ("EightWarps", 1, 512, 256),
    Call(H200, 1, 4, 128): ("FourQueriesLarge", 1, 8, 256),
    Call(H200, 1, 4, 4096): ("FourQueriesLarge", 16, 128, 256),
    Call(H200, 1, 4, 131072): ("FourQueriesLarge", 16, 128, 256),
    Call(H200, 8, 4, 256): ("FourQueriesLarge", 1, 64, 256),
    Call(H200, 20, 4, 4096): ("FourQueriesSmall", 3, 480, 128),
    Call(H200, 64, 4, 4096): ("FourQueriesSmall", 1, 512, 128),
    Call(A100, 8, 4, 4096): ("FourQueriesSmall", 5, 320, 128),
    Call(RTX_3090, 8, 4, 131072): ("FourQueriesLarge", 1, 64, 128),
    Call(SMALL, 1, 4, 4096): ("FourQueriesLarge", 5, 40, 128),
    Call(H200, 1, 8, 4096): ("EightQueriesLarge", 16, 128, 512),
    Call(H200, 8, 8, 256): ("EightQueriesLarge", 1, 64, 512),
    Call(H200, 64, 8, 1024): ("EightQueriesSmall", 1, 512, 128),
    Call(H200, 64, 8, 131072): ("EightQueriesLarge", 1, 512, 512),
    Call(A100, 64, 8, 4096): ("EightQueriesLarge", 1, 512, 256),
    Call(RTX_3090, 8, 8, 4096): ("EightQueriesLarge", 1, 64, 256),
    Call(H200, 1, 16, 131072): ("SixteenQueries", 16, 128, 512),
    Call(H200, 1, 4, 4096, 4): ("SixteenQueries", 16, 128, 512),
    Call(SMALL, 8, 8, 4096, 2): ("SixteenQueries", 1, 64, 256),
    Call(H200, 1, 4, 16384, 2048): ("Sm90Queries128", 1, 132, 384),
    Call(H200, 1, 1, 131072, 32): ("Sm90Queries128", 16, 128, 384),
    Call(A100, 1, 4, 16384, 2048): ("ManyQueries128", 1, 1024, 128),
    Call(RTX_3090, 8, 8, 1024, 64): ("ManyQueries128", 1, 512, 128),
}


@pytest.mark.parametrize("call", PINNED, ids=lambda call: call.line.replace(" ", "-"))
def test_what_is_chosen(program: Path, call: Call) -> None:
    (chosen,) = chosen_for(program, [call])
    assert (chosen.config, chosen.splits, chosen.blocks, chosen.threads) == PINNED[call]


def test_fewer_rows_than_the_cache_has_room_for(program: Path) -> None:
    """Blocks share what is held, not what there is room for: short texts in long caches have as few partials."""
    source = r"""
#include <cstdio>
#include <initializer_list>

#include "attention/schedule.h"

int main() {
  using Eight = kvc::FewQueriesBlock<8, kvc::EightQueriesLarge>;
  for (const unsigned turns : {0u, 1u, 2u, 3u, 8u, 32u, 128u, 1024u}) {
    std::printf("%u ", kvc::useful_splits<Eight>(turns, kvc::FastDivider::by(33), 31));
  }
}
"""
    (program.parent / "fewer.cpp").write_text(source)
    compile_program(program.parent / "fewer.cpp")
    done = subprocess.run([str(program.parent / "fewer")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1", "3", "8", "16", "32", "32"]


def test_properties_of_all_choices(program: Path) -> None:
    """Each key tile belongs to one split; partials have room; the grid and the shared memory are a GPU's."""
    calls = [
        Call(gpu, entries, group, positions, tokens)
        for gpu, entries, group, positions, tokens in itertools.product(
            (H200, A100, RTX_3090, SMALL),
            (1, 8, 64, 200),
            (1, 4, 8, 16),
            (128, 1000, 4096, 131072),
            (1, 2, 4, 40, 2000),
        )
    ]
    for call, chosen in zip(calls, chosen_for(program, calls), strict=True):
        assert chosen.wrong_tiles == 0, call
        assert chosen.splits >= 1, call
        assert chosen.threads % 32 == 0 and 32 <= chosen.threads <= 1024, call
        assert chosen.shared_bytes <= call.gpu[1], call
        if chosen.splits > 1:
            assert chosen.units * chosen.splits * chosen.partial_floats <= call.partial_floats, call
        if chosen.kernel in ("one_query", "few_queries"):
            assert chosen.blocks == chosen.units * chosen.splits, call
            assert chosen.splits == 1 or chosen.units <= 1022, call  # a ticket for each unit that is split
        if chosen.kernel == "sm90":
            assert chosen.blocks <= call.gpu[0], call


def test_a_line_is_printed_on_request(program: Path) -> None:
    call = Call(H200, 1, 4, 4096)
    assert ask(program, [call]).stderr == ask(program, [call], "0").stderr == ""
    line = "kvcache_ext: few_queries FourQueriesLarge: 128 blocks of 256 threads (8 units, 16 splits) on 132 SMs\n"
    assert ask(program, [call, call], "1").stderr == 2 * line
