// Spec: server/engine/scheduler.h.
#include "server/engine/scheduler.h"

#include <gtest/gtest.h>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

const absl::Time kNow = absl::FromUnixSeconds(1000);
const absl::Time kPast = kNow - absl::Seconds(1);
const absl::Time kLater = kNow + absl::Seconds(1);
const absl::Time kNever = absl::InfiniteFuture();

struct PickCase {
  const char* name;
  std::vector<Candidate> candidates;
  std::vector<JobId> ended;
  std::optional<JobId> next;
};

class PickSpec : public testing::TestWithParam<PickCase> {};

TEST_P(PickSpec, DecidesWhatEndsAndWhatRuns) {
  const Decision decision = Pick(GetParam().candidates, kNow);
  EXPECT_EQ(decision.ended, GetParam().ended);
  EXPECT_EQ(decision.next, GetParam().next);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PickSpec,
    testing::Values(
        PickCase{"nothing", {}, {}, std::nullopt},
        PickCase{"one", {{1, 0, kNever, false}}, {}, 1},
        PickCase{"equal_priority_in_order_of_arrival",
                 {{1, 0, kNever, false}, {2, 0, kNever, false}},
                 {},
                 1},
        PickCase{"priority_before_arrival",
                 {{1, 0, kNever, false}, {2, 5, kNever, false}, {3, 5, kNever, false}},
                 {},
                 2},
        PickCase{"negative_priority_waits",
                 {{1, -1, kNever, false}, {2, 0, kNever, false}},
                 {},
                 2},
        PickCase{"an_expired_deadline_ends",
                 {{1, 9, kPast, false}, {2, 0, kLater, false}},
                 {1},
                 2},
        PickCase{
            "a_deadline_that_is_now_ends", {{1, 0, kNow, false}}, {1}, std::nullopt},
        PickCase{"a_stopped_job_ends",
                 {{1, 0, kNever, true}, {2, 0, kNever, false}},
                 {1},
                 2},
        PickCase{"all_ended_keep_their_order",
                 {{1, 0, kPast, false}, {2, 7, kNever, true}, {3, 0, kPast, true}},
                 {1, 2, 3},
                 std::nullopt},
        PickCase{"an_early_deadline_gives_no_precedence",
                 {{1, 0, kNever, false}, {2, 0, kLater, false}},
                 {},
                 1},
        PickCase{"a_shorter_one_overtakes_within_the_patience",
                 {{1, 0, kNever, false, 60, 2}, {2, 0, kNever, false, 2, 0}},
                 {},
                 2},
        PickCase{"not_beyond_it",
                 {{1, 0, kNever, false, 60, 2}, {2, 0, kNever, false, 2.1, 0}},
                 {},
                 1},
        PickCase{"patience_of_everyone_before_counts",
                 {{1, 0, kNever, false, 60, 9},
                  {2, 0, kNever, false, 50, 1},
                  {3, 0, kNever, false, 2, 0}},
                 {},
                 1},
        PickCase{"not_that_of_those_behind",
                 {{1, 0, kNever, false, 60, 9},
                  {2, 0, kNever, false, 2, 0},
                  {3, 0, kNever, false, 50, 0}},
                 {},
                 2},
        PickCase{"the_shortest_of_several",
                 {{1, 0, kNever, false, 60, 9},
                  {2, 0, kNever, false, 3, 3},
                  {3, 0, kNever, false, 2, 0},
                  {4, 0, kNever, false, 2, 0}},
                 {},
                 3},
        PickCase{"a_longer_one_waits",
                 {{1, 0, kNever, false, 2, 9}, {2, 0, kNever, false, 3, 0}},
                 {},
                 1},
        PickCase{"the_unpredicted_overtakes_nobody",
                 {{1, 0, kNever, false, 60, 9}, {2, 0, kNever, false, 0, 0}},
                 {},
                 1},
        PickCase{"a_less_important_one_overtakes_nobody",
                 {{1, 0, kNever, false, 60, 9}, {2, -1, kNever, false, 1, 0}},
                 {},
                 1},
        PickCase{"less_important_ones_have_no_say",
                 {{1, -1, kNever, false, 60, 0},
                  {2, 0, kNever, false, 50, 9},
                  {3, 0, kNever, false, 1, 0}},
                 {},
                 3},
        PickCase{"the_ended_have_no_say",
                 {{1, 0, kNever, true, 60, 0},
                  {2, 0, kNever, false, 50, 9},
                  {3, 0, kNever, false, 1, 0}},
                 {1},
                 3}),
    testing_support::CaseName());

struct CompanionCase {
  const char* name;
  std::vector<Candidate> candidates;  // 1 is next
  std::vector<Companion> companions;
  int32_t tokens_left;
  int32_t places_left;
  std::vector<size_t> picked;
};

void PrintTo(const CompanionCase& c, std::ostream* out) { *out << c.name; }

class PickCompanionsSpec : public testing::TestWithParam<CompanionCase> {};

TEST_P(PickCompanionsSpec, TakesAlongWhoFits) {
  const CompanionCase& c = GetParam();
  size_t next = 0;
  while (c.candidates[next].id != 1) ++next;
  EXPECT_EQ(
      PickCompanions(c.candidates, next, c.companions, c.tokens_left, c.places_left),
      c.picked);
}

const Candidate kNext = {.id = 1, .seconds_left = 1};
const Candidate kShort = {.id = 2, .seconds_left = 1};
const Candidate kPatient = {.id = 9, .seconds_left = 60, .patience_seconds = 2};

INSTANTIATE_TEST_SUITE_P(
    Cases, PickCompanionsSpec,
    testing::Values(CompanionCase{"nobody_waits", {kNext}, {}, 100, 9, {}},
                    CompanionCase{"all_that_wait",
                                  {kNext, kShort, kShort},
                                  {{1, 50}, {2, 50}},
                                  100,
                                  9,
                                  {1, 2}},
                    CompanionCase{"as_many_tokens_as_fit",
                                  {kNext, kShort, kPatient, kShort},
                                  {{1, 40}, {2, 70}, {3, 60}},
                                  100,
                                  9,
                                  {1}},
                    CompanionCase{"one_that_is_too_large_is_passed_within_its_patience",
                                  {kNext, kPatient, kShort},
                                  {{1, 101}, {2, 60}},
                                  100,
                                  9,
                                  {2}},
                    CompanionCase{"as_many_as_have_a_place",
                                  {kNext, kShort, kShort},
                                  {{1, 1}, {2, 1}},
                                  100,
                                  1,
                                  {1}},
                    CompanionCase{"an_earlier_one_that_waits_has_patience_for_so_many",
                                  {kPatient, kNext, kShort, kShort},
                                  {{2, 1}, {3, 1}},
                                  100,
                                  9,
                                  {2}},
                    CompanionCase{"one_between_has_too",
                                  {kNext, kPatient, kShort, kShort},
                                  {{2, 1}, {3, 1}},
                                  100,
                                  9,
                                  {2}},
                    CompanionCase{"the_unpredicted_overtakes_nobody",
                                  {kNext, {.id = 3}, kPatient, {.id = 4}},
                                  {{1, 1}, {3, 1}},
                                  100,
                                  9,
                                  {1}},
                    CompanionCase{
                        "another_priority_has_no_say",
                        {{.id = 9, .priority = -1, .seconds_left = 60}, kNext, kShort},
                        {{2, 1}},
                        100,
                        9,
                        {2}}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
