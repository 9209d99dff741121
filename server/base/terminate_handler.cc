#include "server/base/terminate_handler.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <system_error>

namespace pbs::server {
namespace {

// No allocation: there may be nothing left to allocate.
void Write(const char* text) {
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}

void Say(const char* event, const char* message) {
  Write("{\"level\":\"error\",\"event\":\"");
  Write(event);
  Write("\",\"message\":\"");
  Write(message);
  Write("\"}\n");
}

[[noreturn]] void EndOutOf(const char* message) {
  Say("out_of_resources", message);
  _exit(kExitOutOfResources);
}

[[noreturn]] void OnTerminate() {
  const std::exception_ptr thrown = std::current_exception();
  if (thrown == nullptr) std::abort();
  try {
    std::rethrow_exception(thrown);
  } catch (const std::bad_alloc&) {
    EndOutOf(
        "the system refused memory; raise the limit (ulimit -v, or that of the "
        "container), or lower admission.memory_bytes_max");
  } catch (const std::system_error& error) {
    if (error.code() == std::errc::resource_unavailable_try_again) {
      EndOutOf(
          "the system refused a thread; raise the limit (pids limit of the container, "
          "ulimit -u, ulimit -v), or lower cpu.threads");
    }
    Say("uncaught_exception", error.what());
  } catch (const std::exception& error) {
    Say("uncaught_exception", error.what());
  } catch (...) {
    Say("uncaught_exception", "an exception of an unknown type");
  }
  std::abort();
}

}  // namespace

void InstallTerminateHandler() { std::set_terminate(OnTerminate); }

}  // namespace pbs::server
