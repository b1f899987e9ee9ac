// What libwsync_cuda.so says about the machine. Plain C, since the library is opened with dlopen on first use.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum { WSYNC_CUDA_NAME_BYTES = 256, WSYNC_CUDA_MAX_DEVICES = 64 };

typedef struct WsyncCudaDevice {
  char name[WSYNC_CUDA_NAME_BYTES];
  int capability_major;
  int capability_minor;
  unsigned long long memory_bytes;
} WsyncCudaDevice;

typedef struct WsyncCudaProbe {
  int num_devices;
  int driver_version;                  // as CUDA counts: 13000 for 13.0; 0 without a driver
  int runtime_version;                 // of the libcudart that was loaded
  char reason[WSYNC_CUDA_NAME_BYTES];  // why there are no devices, or empty
  WsyncCudaDevice devices[WSYNC_CUDA_MAX_DEVICES];
} WsyncCudaProbe;

// Fills `probe` and returns 0 where a device can be used. Creates no context. Safe from any thread.
typedef int (*WsyncCudaProbeFn)(WsyncCudaProbe* probe);

#ifdef __cplusplus
}
#endif
