/* The five likeliest classes of a picture:
 *
 *   classify mobilenet.int8.safetensors picture.ppm [logits.bin]
 *
 * The picture is a binary PPM (P6) of 8 bits and any size. The logits are also written as they are,
 * floats one after another, where a third argument says so. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "vitkd_int8.h"

/* a number of a PPM's header, before which there may be space and comments; -1 if there is none */
static int number(FILE* file) {
  int c = fgetc(file), value = 0;
  while (c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '#') {
    if (c == '#') {
      while (c != '\n' && c != EOF) c = fgetc(file);
    } else {
      c = fgetc(file);
    }
  }
  if (c < '0' || c > '9') return -1;
  for (; c >= '0' && c <= '9' && value < 100000; c = fgetc(file)) value = 10 * value + (c - '0');
  return value;
}

/* the [height, width, 3] bytes of a picture, to be freed; NULL, with a message, if it is no such */
static uint8_t* read_ppm(const char* path, size_t* height, size_t* width) {
  uint8_t* pixels = NULL;
  FILE* file = fopen(path, "rb");
  if (file == NULL) {
    perror(path);
    return NULL;
  }
  if (fgetc(file) != 'P' || fgetc(file) != '6') {
    fprintf(stderr, "%s: expected a binary PPM (P6)\n", path);
  } else {
    const int columns = number(file), rows = number(file), most = number(file);
    if (columns < 1 || columns > 20000 || rows < 1 || rows > 20000 || most != 255) {
      fprintf(stderr, "%s: expected up to 20000x20000 pixels of up to 255, got %dx%d of up to %d\n",
              path, columns, rows, most);
    } else {
      const size_t bytes = (size_t)rows * (size_t)columns * 3;
      *height = (size_t)rows;
      *width = (size_t)columns;
      if ((pixels = malloc(bytes)) == NULL || fread(pixels, 1, bytes, file) != bytes) {
        fprintf(stderr, "%s: expected %lu bytes of pixels\n", path, (unsigned long)bytes);
        free(pixels);
        pixels = NULL;
      }
    }
  }
  fclose(file);
  return pixels;
}

static int write_logits(const char* path, const float* logits, size_t count) {
  FILE* file = fopen(path, "wb");
  int failed = file == NULL || fwrite(logits, sizeof *logits, count, file) != count;
  if (file != NULL && fclose(file) != 0) failed = 1;
  if (failed) perror(path);
  return failed;
}

static void print_best(const vitkd_int8_session* session, const float* logits) {
  const int classes = vitkd_int8_classes(session);
  int best[5], count = 0, i, at;
  for (i = 0; i < classes; ++i) {
    for (at = count; at > 0 && logits[i] > logits[best[at - 1]]; --at) {
      if (at < 5) best[at] = best[at - 1];
    }
    if (at < 5) best[at] = i;
    if (count < 5) ++count;
  }
  for (i = 0; i < count; ++i) {
    const char* name = vitkd_int8_class_name(session, best[i]);
    printf("%9.4f  %d %s\n", logits[best[i]], best[i], name == NULL ? "" : name);
  }
}

int main(int argc, char** argv) {
  vitkd_int8_session* session;
  size_t height = 0, width = 0, size, classes;
  uint8_t *pixels, *image;
  float* logits;
  int failed = 1;
  if (argc != 3 && argc != 4) {
    fprintf(stderr, "usage: classify MODEL PICTURE.ppm [LOGITS]\n");
    return 2;
  }
  if (vitkd_int8_open(argv[1], NULL, &session) != VITKD_INT8_OK) {
    fprintf(stderr, "%s\n", vitkd_int8_last_error());
    return 1;
  }
  size = (size_t)vitkd_int8_image_size(session);
  classes = (size_t)vitkd_int8_classes(session);
  pixels = read_ppm(argv[2], &height, &width);
  image = malloc(size * size * 3);
  logits = malloc(classes * sizeof *logits);
  if (pixels != NULL && image != NULL && logits != NULL) {
    const ptrdiff_t stride = (ptrdiff_t)(width * 3);
    if (vitkd_int8_prepare(session, pixels, height, width, stride, image) != VITKD_INT8_OK ||
        vitkd_int8_run(session, image, 1, logits) != VITKD_INT8_OK) {
      fprintf(stderr, "%s\n", vitkd_int8_last_error());
    } else {
      print_best(session, logits);
      failed = argc == 4 && write_logits(argv[3], logits, classes);
    }
  }
  free(logits);
  free(image);
  free(pixels);
  vitkd_int8_close(session);
  return failed;
}
