#include "virtio.h"

/* ---- transport ---- */
static u32 get(struct virtio *device, u32 offset) { return mmio_read32(device->base + offset); }
static void set(struct virtio *device, u32 offset, u32 value) { mmio_write32(device->base + offset, value); }

bool virtio_find(struct virtio *device, u32 device_id, u32 skip)
{
    for (u32 window = 0; window < 1000; window++) {
        device->base = VIRTIO_MMIO_BASE + window * VIRTIO_MMIO_STEP;
        device->gsi = 5 + window % 18;
        if (get(device, MMIO_MAGIC) != VIRTIO_MAGIC)
            return 0; /* windows are handed out in order */
        if (get(device, MMIO_VERSION) == 2 && get(device, MMIO_DEVICE_ID) == device_id && !skip--)
            return 1;
    }
    return 0;
}

void virtio_reset(struct virtio *device)
{
    set(device, MMIO_STATUS, 0);
    for (u64 start = rdtsc(); get(device, MMIO_STATUS);)
        if (rdtsc() - start > tsc_khz() * 1000)
            fail("device does not finish its reset");
}

u32 virtio_status(struct virtio *device) { return get(device, MMIO_STATUS); }

void virtio_negotiate(struct virtio *device, u64 wanted)
{
    virtio_reset(device);
    set(device, MMIO_STATUS, ACKNOWLEDGE);
    set(device, MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    set(device, MMIO_DEVICE_FEATURES_SEL, 0);
    device->offered = get(device, MMIO_DEVICE_FEATURES);
    set(device, MMIO_DEVICE_FEATURES_SEL, 1);
    device->offered |= (u64)get(device, MMIO_DEVICE_FEATURES) << 32;
    device->features = device->offered & wanted;
    set(device, MMIO_DRIVER_FEATURES_SEL, 0);
    set(device, MMIO_DRIVER_FEATURES, (u32)device->features);
    set(device, MMIO_DRIVER_FEATURES_SEL, 1);
    set(device, MMIO_DRIVER_FEATURES, (u32)(device->features >> 32));
    set(device, MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(get(device, MMIO_STATUS) & FEATURES_OK))
        fail("device refuses the features");
}

void virtio_ready(struct virtio *device) { set(device, MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK); }

u64 config_read64(struct virtio *device, u32 offset)
{
    for (;;) {
        u32 generation = get(device, MMIO_CONFIG_GENERATION);
        u64 value = get(device, MMIO_CONFIG + offset) | (u64)get(device, MMIO_CONFIG + offset + 4) << 32;
        if (get(device, MMIO_CONFIG_GENERATION) == generation)
            return value;
    }
}

/* ---- queue ---- */
static void set64(struct virtio *device, u32 offset, volatile void *address)
{
    set(device, offset, (u32)(u64)address);
    set(device, offset + 4, (u32)((u64)address >> 32));
}

void queue_set_up(struct queue *queue, struct virtio *device, u16 number, u16 limit)
{
    set(device, MMIO_QUEUE_SEL, number);
    u32 size = get(device, MMIO_QUEUE_SIZE_MAX);
    if (!size)
        fail("no such queue");
    if (size > limit)
        size = limit;
    if (!queue->descriptors) {
        queue->descriptors = memory_take(limit * sizeof(struct descriptor), 4096);
        queue->available = memory_take(6 + 2ul * limit, 4096);
        queue->used = memory_take(6 + sizeof(struct used_element) * limit, 4096);
    }
    memset((void *)queue->available, 0, 6 + 2ul * limit);
    memset((void *)queue->used, 0, 6 + sizeof(struct used_element) * limit);
    queue->device = device;
    queue->number = number;
    queue->size = (u16)size;
    queue->available_index = queue->published = queue->used_index = 0;
    queue->event_index = !!(device->features & F_EVENT_IDX);
    queue->notifications = 0;
    set(device, MMIO_QUEUE_SIZE, size);
    set64(device, MMIO_QUEUE_DESC, queue->descriptors);
    set64(device, MMIO_QUEUE_DRIVER, queue->available);
    set64(device, MMIO_QUEUE_DEVICE, queue->used);
    set(device, MMIO_QUEUE_READY, 1);
}

void queue_put(struct queue *queue, u16 head)
{
    queue->available->ring[queue->available_index++ & (queue->size - 1)] = head;
}

bool queue_publish(struct queue *queue)
{
    u16 old = queue->published, new = queue->available_index;
    if (old == new)
        return 0;
    barrier();
    queue->available->index = new;
    queue->published = new;
    full_barrier();
    if (queue->event_index) { /* avail_event follows the used ring: 2.7.10 */
        u16 event = *(volatile u16 *)&queue->used->ring[queue->size];
        if ((u16)(new - event - 1) >= (u16)(new - old))
            return 0;
    } else if (queue->used->flags & 1) {
        return 0;
    }
    queue->notifications++;
    set(queue->device, MMIO_QUEUE_NOTIFY, queue->number);
    return 1;
}

void queue_want_interrupts(struct queue *queue, bool wanted)
{
    queue->available->flags = !wanted && !queue->event_index;
    /* used_event follows the available ring: the next used entry, or one that lies behind us. */
    queue->available->ring[queue->size] = wanted ? queue->used_index : (u16)(queue->used_index - 1);
    full_barrier();
}

/* ---- virtio-blk ---- */
void block_open(struct block *block, u32 skip, u64 without)
{
    if (!block->device.base && !virtio_find(&block->device, VIRTIO_ID_BLOCK, skip))
        fail("no block device");
    u64 wanted = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_BLK_RO | F_BLK_FLUSH | F_BLK_SEG_MAX | F_BLK_SIZE_MAX;
    virtio_negotiate(&block->device, wanted & ~without);
    queue_set_up(&block->queue, &block->device, 0, 256);
    virtio_ready(&block->device);
    queue_want_interrupts(&block->queue, block->interrupts);
    block->sectors = config_read64(&block->device, 0);
}

void block_shape(struct block *block, u32 depth, u32 size, u32 segment)
{
    enum { SLOTS = 128, TABLE = 256 };
    static u8 *data;
    static u64 data_size;
    static struct block_request *requests;
    static struct descriptor *tables;
    if (!requests) {
        requests = memory_take(sizeof(struct block_request) * SLOTS, 64);
        tables = memory_take(sizeof(struct descriptor) * SLOTS * TABLE, 4096);
    }
    if ((u64)depth * size > data_size) {
        data_size = (u64)depth * size;
        data = memory_take(data_size, 4096);
    }
    u32 segments = segment ? (size + segment - 1) / segment : 1;
    bool indirect = !!(block->device.features & F_INDIRECT);
    block->per_request = indirect ? 1 : segments + 2;
    block->depth = depth;
    block->segment = segment;
    block->request_size = size;
    block->requests = requests;
    if (depth > SLOTS || segments + 2 > TABLE || depth * block->per_request > block->queue.size)
        fail("more in flight than the queue holds");
    for (u32 slot = 0; slot < depth; slot++) {
        requests[slot].data = data + (u64)slot * size;
        requests[slot].indirect = tables + (u64)slot * TABLE;
    }
}

void block_submit(struct block *block, u32 slot, u32 type, u64 sector, u32 size)
{
    struct block_request *request = &block->requests[slot];
    request->type = type;
    request->reserved = 0;
    request->sector = sector;
    request->status = 0xff;

    u16 head = (u16)(slot * block->per_request), base = head, at = 0;
    bool indirect = !!(block->device.features & F_INDIRECT);
    volatile struct descriptor *table = block->queue.descriptors + head;
    if (indirect) {
        table = request->indirect;
        base = 0;
    }
    table[at] = (struct descriptor){(u64)request, 16, DESC_NEXT, (u16)(base + at + 1)};
    at++;
    u32 segment = block->segment ? block->segment : size;
    u16 direction = type == BLOCK_IN || type == BLOCK_GET_ID ? DESC_WRITE : 0;
    for (u32 done = 0; done < size; done += segment, at++) {
        u32 length = size - done < segment ? size - done : segment;
        table[at] = (struct descriptor){(u64)request->data + done, length, (u16)(DESC_NEXT | direction), (u16)(base + at + 1)};
    }
    table[at] = (struct descriptor){(u64)&request->status, 1, DESC_WRITE, 0};
    at++;
    if (indirect)
        block->queue.descriptors[head] = (struct descriptor){(u64)table, at * (u32)sizeof(struct descriptor), DESC_INDIRECT, 0};
    queue_put(&block->queue, head);
}

int block_poll(struct block *block)
{
    if (!queue_has_used(&block->queue))
        return -1;
    barrier();
    return (int)(queue_take_used(&block->queue).id / block->per_request);
}

u8 block_do(struct block *block, u32 type, u64 sector, u32 size)
{
    block_submit(block, 0, type, sector, size);
    queue_publish(&block->queue);
    u64 start = rdtsc(), limit = tsc_khz() * 1000;
    while (block_poll(block) < 0) {
        cpu_relax();
        if (rdtsc() - start > limit)
            return 255;
    }
    queue_want_interrupts(&block->queue, block->interrupts);
    return block->requests[0].status;
}
