/* A polling driver for virtio-mmio version 2 devices with split virtqueues (virtio 1.2, sections 2.7 and 4.2) and virtio-blk (5.2). */
#pragma once
#include "bare.h"

enum virtio_mmio_register { /* 4.2.2 */
    MMIO_MAGIC = 0x000,
    MMIO_VERSION = 0x004,
    MMIO_DEVICE_ID = 0x008,
    MMIO_DEVICE_FEATURES = 0x010,
    MMIO_DEVICE_FEATURES_SEL = 0x014,
    MMIO_DRIVER_FEATURES = 0x020,
    MMIO_DRIVER_FEATURES_SEL = 0x024,
    MMIO_QUEUE_SEL = 0x030,
    MMIO_QUEUE_SIZE_MAX = 0x034,
    MMIO_QUEUE_SIZE = 0x038,
    MMIO_QUEUE_READY = 0x044,
    MMIO_QUEUE_NOTIFY = 0x050,
    MMIO_INTERRUPT_STATUS = 0x060,
    MMIO_INTERRUPT_ACK = 0x064,
    MMIO_STATUS = 0x070,
    MMIO_QUEUE_DESC = 0x080,
    MMIO_QUEUE_DRIVER = 0x090,
    MMIO_QUEUE_DEVICE = 0x0a0,
    MMIO_CONFIG_GENERATION = 0x0fc,
    MMIO_CONFIG = 0x100,
};
enum virtio_status { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64, FAILED = 128 };

#define VIRTIO_MAGIC 0x74726976u
#define VIRTIO_ID_BLOCK 2
#define FEATURE(bit) (1ul << (bit))
#define F_INDIRECT FEATURE(28)
#define F_EVENT_IDX FEATURE(29)
#define F_VERSION_1 FEATURE(32)
#define F_BLK_SIZE_MAX FEATURE(1)
#define F_BLK_SEG_MAX FEATURE(2)
#define F_BLK_RO FEATURE(5)
#define F_BLK_FLUSH FEATURE(9)

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};
struct available {
    u16 flags, index, ring[];
};
struct used_element {
    u32 id, length;
};
struct used {
    u16 flags, index;
    struct used_element ring[];
};

struct virtio {
    u64 base;
    u32 gsi; /* the n-th window has interrupt line 5 + n % 18 in the monitors this is for */
    u64 offered, features;
};
struct queue {
    struct virtio *device;
    u16 number, size;
    volatile struct descriptor *descriptors;
    volatile struct available *available;
    volatile struct used *used;
    u16 available_index; /* next to fill; published by queue_publish */
    u16 published, used_index;
    bool event_index;
    u64 notifications;
};

bool virtio_find(struct virtio *device, u32 device_id, u32 skip); /* the skip-th device of that kind */
void virtio_reset(struct virtio *device);
u32 virtio_status(struct virtio *device);
/* Reset, ACKNOWLEDGE, DRIVER, features (the offered ones among wanted), FEATURES_OK. */
void virtio_negotiate(struct virtio *device, u64 wanted);
void virtio_ready(struct virtio *device);
/* Memory for at most `limit` entries on first use; the same memory again after a device reset. */
void queue_set_up(struct queue *queue, struct virtio *device, u16 number, u16 limit);
void queue_put(struct queue *queue, u16 head);
/* Makes what was put visible, and notifies when the device asks for it. Returns whether it did. */
bool queue_publish(struct queue *queue);
void queue_want_interrupts(struct queue *queue, bool wanted);
static inline bool queue_has_used(const struct queue *queue) { return queue->used->index != queue->used_index; }
static inline struct used_element queue_take_used(struct queue *queue)
{
    volatile struct used_element *element = &queue->used->ring[queue->used_index++ & (queue->size - 1)];
    return (struct used_element){element->id, element->length};
}
u64 config_read64(struct virtio *device, u32 offset);

/* ---- virtio-blk ---- */
#define SECTOR 512ul
enum block_type { BLOCK_IN = 0, BLOCK_OUT = 1, BLOCK_FLUSH = 4, BLOCK_GET_ID = 8 };
enum { BLOCK_OK = 0, BLOCK_IO_ERROR = 1, BLOCK_UNSUPPORTED = 2 };

struct block_request {
    u32 type, reserved;
    u64 sector;
    volatile u8 status;
    u8 *data;
    struct descriptor *indirect;
};
struct block {
    struct virtio device;
    struct queue queue;
    u64 sectors;
    u32 depth;      /* requests that may be in flight */
    u32 segment;    /* bytes per data descriptor, 0 = all in one */
    u32 per_request; /* descriptors each takes from the queue */
    u32 request_size; /* bytes of data each request has room for */
    bool interrupts;
    struct block_request *requests;
};

/* Finds the skip-th block device and starts it, with features less `without`. */
void block_open(struct block *block, u32 skip, u64 without);
/* (Re)builds the request slots: depth of them with size bytes of data each. Nothing may be in flight. */
void block_shape(struct block *block, u32 depth, u32 size, u32 segment);
/* Queues request `slot`; size of data in bytes. Not visible to the device before queue_publish. */
void block_submit(struct block *block, u32 slot, u32 type, u64 sector, u32 size);
/* The slot of a finished request, or -1. */
int block_poll(struct block *block);
/* One request with slot 0, waited for. Returns its status byte, 255 when the device does not answer for a second. */
u8 block_do(struct block *block, u32 type, u64 sector, u32 size);
