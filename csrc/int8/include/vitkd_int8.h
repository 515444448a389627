/* The int8 engine of vitkd_fast in C: a MobileNet quantized once classifies images of 8 bits, and
 * one file gives the same logits, byte for byte, on every CPU.
 *
 *   vitkd_int8_session *session;
 *   if (vitkd_int8_open("mobilenet.int8.safetensors", NULL, &session) != VITKD_INT8_OK) {
 *     fprintf(stderr, "%s\n", vitkd_int8_last_error());
 *     return 1;
 *   }
 *   vitkd_int8_prepare(session, pixels, height, width, stride, image);
 *   vitkd_int8_run(session, image, 1, logits);
 *   vitkd_int8_close(session);
 *
 * No function throws, prints, or ends the process. A session may be used from several threads at
 * once; it may be closed when no call on it is left running. After a fork the child may use the
 * sessions of its parent. The rounding mode and the exception flags of the caller are left as they
 * are, and do not change the logits. */
#ifndef VITKD_INT8_H
#define VITKD_INT8_H

#include <stddef.h>
#include <stdint.h>

#define VITKD_INT8_VERSION "0.2.0"

#if defined(__GNUC__)
#define VITKD_INT8_API __attribute__((visibility("default")))
#else
#define VITKD_INT8_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vitkd_int8_session vitkd_int8_session;

typedef enum vitkd_int8_status {
  VITKD_INT8_OK = 0,
  VITKD_INT8_ARGUMENT = 1, /* an argument, or VITKD_FAST_ISA, is none that is accepted */
  VITKD_INT8_IO = 2,       /* the file cannot be opened or read */
  VITKD_INT8_FORMAT = 3,   /* it is no int8 file, is damaged, or breaks a rule of the format */
  VITKD_INT8_RESOURCE = 4, /* memory or threads are not to be had */
  VITKD_INT8_INTERNAL = 5  /* a fault of this library: please report it */
} vitkd_int8_status;

/* All zero is what NULL stands for: one thread, the best instruction set, the file's image size. */
typedef struct vitkd_int8_options {
  int threads;     /* that share a call, 1 to 256; 0: 1 */
  int image_size;  /* side of the images, 1 to 8192; 0: as the file says */
  const char* isa; /* instruction set, a name of vitkd_int8_isa_at; NULL or "": the best */
} vitkd_int8_options;

/* Makes a file ready to run. The file is read once and may then change or go; path, options and
 * what they point to are only read during the call. *session is NULL after an error; otherwise the
 * caller owns it, and gives it back with vitkd_int8_close. Opening takes memory in proportion to
 * the file's size, never what a file only claims. */
VITKD_INT8_API vitkd_int8_status vitkd_int8_open(const char* path,
                                                 const vitkd_int8_options* options,
                                                 vitkd_int8_session** session);

/* The same from the `size` bytes of a file at `data`, which need no alignment (aligned to 8 bytes
 * they are not copied) and may be freed or changed after the call. */
VITKD_INT8_API vitkd_int8_status vitkd_int8_open_memory(const void* data, size_t size,
                                                        const vitkd_int8_options* options,
                                                        vitkd_int8_session** session);

/* Frees the session, its memory and its threads; NULL is ignored. */
VITKD_INT8_API void vitkd_int8_close(vitkd_int8_session* session);

/* From a picture of any size to an image of the session: the short side resized as the file says,
 * the centre cropped, the same bytes on every CPU.
 * pixels: RGB of 8 bits, upright, [height, width, 3], each row `stride` bytes after the one before
 * (negative: bottom up). image: image_size * image_size * 3 bytes, which overlap no pixels. */
VITKD_INT8_API vitkd_int8_status vitkd_int8_prepare(const vitkd_int8_session* session,
                                                    const uint8_t* pixels, size_t height,
                                                    size_t width, ptrdiff_t stride, uint8_t* image);

/* Logits of `count` images.
 * images: count * image_size * image_size * 3 bytes, [count, height, width, RGB], as
 * vitkd_int8_prepare makes them: not normalized.
 * logits: count * classes floats, [count, classes], written whole.
 * With 0 images neither is touched, and both may be NULL. The first call, and each that overlaps
 * others, takes vitkd_int8_run_bytes of memory, which the session keeps; no other call allocates.
 */
VITKD_INT8_API vitkd_int8_status vitkd_int8_run(vitkd_int8_session* session, const uint8_t* images,
                                                size_t count, float* logits);

/* What the calling thread's last failed call found wrong: one line of at most 1023 bytes that says
 * what was expected and what was given, or "". It belongs to the library, and lasts until the next
 * failure in this thread. */
VITKD_INT8_API const char* vitkd_int8_last_error(void);

/* What a session is. None of these fails for a session that is open. */
VITKD_INT8_API int vitkd_int8_image_size(const vitkd_int8_session* session); /* side, in pixels */
VITKD_INT8_API int vitkd_int8_classes(const vitkd_int8_session* session);    /* logits per image */
VITKD_INT8_API int vitkd_int8_threads(const vitkd_int8_session* session);
/* "u8 NHWC RGB", today for every file. */
VITKD_INT8_API const char* vitkd_int8_input_layout(const vitkd_int8_session* session);
/* The instruction set of its kernels. */
VITKD_INT8_API const char* vitkd_int8_isa(const vitkd_int8_session* session);
/* The name of class `index` in UTF-8, which belongs to the session; NULL where the file has no
 * names or no such class. */
VITKD_INT8_API const char* vitkd_int8_class_name(const vitkd_int8_session* session, int index);
/* Bytes of packed weights, and those that the first and each concurrent call takes. For files of
 * strangers: a small file may ask for gigabytes of activations. */
VITKD_INT8_API size_t vitkd_int8_weight_bytes(const vitkd_int8_session* session);
VITKD_INT8_API size_t vitkd_int8_run_bytes(const vitkd_int8_session* session);

/* The instruction sets that this CPU and VITKD_FAST_ISA allow, best first; NULL past the last.
 * Names are static. NULL for 0 too where VITKD_FAST_ISA names none that is accepted: see
 * vitkd_int8_last_error. */
VITKD_INT8_API const char* vitkd_int8_isa_at(int index);

/* The library's version, which is VITKD_INT8_VERSION if header and library belong together. */
VITKD_INT8_API const char* vitkd_int8_version(void);

#ifdef __cplusplus
}
#endif

#endif
