// Spec: server/base/process.h.
#include "server/base/process.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/base/host_bytes.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

struct File {
  std::string path;
  std::string text;
};

// A folder that looks like the root of a machine with 16 GiB.
class FakeRoot {
 public:
  explicit FakeRoot(const std::vector<File>& files)
      : path_(testing::TempDir() + "pbs_fake_root_" +
              testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(path_);
    Write({"/proc/meminfo", "MemTotal:       16777216 kB\nMemFree:  1 kB\n"});
    for (const File& file : files) Write(file);
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }

  SystemRoot Get() const { return {path_}; }

 private:
  void Write(const File& file) const {
    const std::filesystem::path target = path_ + file.path;
    std::filesystem::create_directories(target.parent_path());
    std::ofstream(target) << file.text;
  }

  const std::string path_;
};

TEST(MemoryLimit, IsTheMachinesMemoryWithoutControlGroups) {
  const FakeRoot root({});
  EXPECT_EQ(MemoryLimitBytes(root.Get()), 16 * kGiB);
}

TEST(MemoryLimit, FollowsTheUnifiedHierarchyUpToItsParents) {
  const FakeRoot root({{"/proc/self/cgroup", "0::/pod/container\n"},
                       {"/sys/fs/cgroup/pod/container/memory.max", "max\n"},
                       {"/sys/fs/cgroup/pod/memory.max", "2147483648\n"}});
  EXPECT_EQ(MemoryLimitBytes(root.Get()), 2 * kGiB);
}

TEST(MemoryLimit, InsideAContainerTheHierarchysRootIsTheOwnGroup) {
  const FakeRoot root(
      {{"/proc/self/cgroup", "0::/\n"}, {"/sys/fs/cgroup/memory.max", "1073741824\n"}});
  EXPECT_EQ(MemoryLimitBytes(root.Get()), kGiB);
}

TEST(MemoryLimit, ReadsTheOldHierarchyWhereMemoryIsMountedThere) {
  const FakeRoot root(
      {{"/proc/self/cgroup", "4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n"},
       {"/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "3221225472\n"},
       {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"}});
  EXPECT_EQ(MemoryLimitBytes(root.Get()), 3 * kGiB);
}

TEST(MemoryLimit, OfThisMachineIsPositive) { EXPECT_GT(MemoryLimitBytes(), 0); }

TEST(UsableCpus, AreCutToTheQuotaRoundedUp) {
  const FakeRoot root({{"/proc/self/cgroup", "0::/a\n"},
                       {"/sys/fs/cgroup/a/cpu.max", "50000 100000\n"}});
  EXPECT_EQ(UsableCpus(root.Get()), 1);
}

TEST(UsableCpus, AreCutToTheOldHierarchysQuota) {
  const FakeRoot root({{"/proc/self/cgroup", "1:cpu,cpuacct:/a\n"},
                       {"/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "20000\n"},
                       {"/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}});
  EXPECT_EQ(UsableCpus(root.Get()), 1);
}

TEST(UsableCpus, WithoutAQuotaAreThoseOfTheAffinityMask) {
  const FakeRoot unlimited(
      {{"/proc/self/cgroup", "0::/a\n"}, {"/sys/fs/cgroup/a/cpu.max", "max 100000\n"}});
  const FakeRoot old_unlimited({{"/proc/self/cgroup", "1:cpu:/a\n"},
                                {"/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n"}});
  EXPECT_GE(UsableCpus(unlimited.Get()), 1);
  EXPECT_EQ(UsableCpus(unlimited.Get()), UsableCpus(old_unlimited.Get()));
}

struct KilobyteCase {
  const char* name;
  const char* text;
  std::optional<int64_t> bytes;
};

class KilobyteLineSpec : public testing::TestWithParam<KilobyteCase> {};

TEST_P(KilobyteLineSpec, IsParsed) {
  EXPECT_EQ(ParseKilobyteLine(GetParam().text, "VmRSS"), GetParam().bytes);
}

INSTANTIATE_TEST_SUITE_P(
    Lines, KilobyteLineSpec,
    testing::Values(
        KilobyteCase{"usual", "VmHWM:\t  9 kB\nVmRSS:\t    12 kB\n", 12 * 1024},
        KilobyteCase{"absent", "VmHWM:\t  9 kB\n", std::nullopt},
        KilobyteCase{"longer_name", "VmRSSx:\t  9 kB\n", std::nullopt},
        KilobyteCase{"other_unit", "VmRSS:\t  9 MB\n", std::nullopt},
        KilobyteCase{"no_number", "VmRSS:\t kB\n", std::nullopt},
        KilobyteCase{"negative", "VmRSS: -1 kB\n", std::nullopt},
        KilobyteCase{"overflow", "VmRSS: 9223372036854775807 kB\n", std::nullopt}),
    testing_support::CaseName());

struct CpuMaxCase {
  const char* name;
  const char* text;
  std::optional<double> cpus;
};

class CpuMaxSpec : public testing::TestWithParam<CpuMaxCase> {};

TEST_P(CpuMaxSpec, IsParsed) {
  EXPECT_EQ(ParseCpuMax(GetParam().text), GetParam().cpus);
}

INSTANTIATE_TEST_SUITE_P(
    Lines, CpuMaxSpec,
    testing::Values(CpuMaxCase{"quota", "150000 100000\n", 1.5},
                    CpuMaxCase{"none", "max 100000\n", std::nullopt},
                    CpuMaxCase{"empty", "", std::nullopt},
                    CpuMaxCase{"one_number", "150000", std::nullopt},
                    CpuMaxCase{"zero_period", "150000 0", std::nullopt}),
    testing_support::CaseName());

TEST(ProcessMemory, ThePeakFollowsTheMeasuredUse) {
  ASSERT_TRUE(ResetPeakResidentBytes().ok());
  const int64_t before = ResidentBytes();
  constexpr int64_t kSize = 64 << 20;
  {
    HostBytes bytes = *HostBytes::Allocate(kSize);
    std::memset(bytes.data(), 1, kSize);
  }
  EXPECT_GE(PeakResidentBytes(), before + kSize * 9 / 10);
  ASSERT_TRUE(ResetPeakResidentBytes().ok());
  EXPECT_LT(PeakResidentBytes(), before + kSize / 2);
}

}  // namespace
}  // namespace pbs::server
