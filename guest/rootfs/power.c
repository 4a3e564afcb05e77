/*
 * Heeds the power button: asks init to switch the machine off. The kernel tells of ACPI's buttons by generic netlink
 * (drivers/acpi/event.c: family "acpi_event"), which needs no input device. Ends at once on a kernel without ACPI.
 */
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FAMILY "acpi_event"
#define BUTTON "button/power"

/* struct acpi_genl_event begins with the device's class. */
enum { ATTRIBUTE_EVENT = 1, CLASS_SIZE = 20 };

static struct {
    struct nlmsghdr head;
    struct genlmsghdr general;
    char attributes[8192];
} message;

/* The contents of the attribute of this kind among `size` bytes of them, and how many there are; 0 when there is none. */
static void *find(void *from, int size, int kind, int *length)
{
    while (size >= NLA_HDRLEN) {
        struct nlattr *at = from;
        int step = NLA_ALIGN(at->nla_len);
        if (at->nla_len < NLA_HDRLEN || at->nla_len > size)
            return 0;
        if ((at->nla_type & NLA_TYPE_MASK) == kind) {
            *length = at->nla_len - NLA_HDRLEN;
            return (char *)at + NLA_HDRLEN;
        }
        from = (char *)from + step;
        size -= step;
    }
    return 0;
}

/* Receives a message; how many bytes of attributes it has, -1 when there is none to be had. */
static int receive(int fd)
{
    ssize_t n = recv(fd, &message, sizeof message, 0);
    if (n < (ssize_t)(NLMSG_HDRLEN + GENL_HDRLEN) || message.head.nlmsg_type == NLMSG_ERROR)
        return -1;
    return (int)n - NLMSG_HDRLEN - GENL_HDRLEN;
}

/* The number of the family's one multicast group, or 0. */
static unsigned group_of_family(int fd)
{
    struct nlattr name = {NLA_HDRLEN + sizeof FAMILY, CTRL_ATTR_FAMILY_NAME};
    int size, length;
    message.head = (struct nlmsghdr){NLMSG_HDRLEN + GENL_HDRLEN + NLA_ALIGN(name.nla_len), GENL_ID_CTRL, NLM_F_REQUEST, 1, 0};
    message.general = (struct genlmsghdr){.cmd = CTRL_CMD_GETFAMILY, .version = 1};
    memcpy(message.attributes, &name, sizeof name);
    memcpy(message.attributes + NLA_HDRLEN, FAMILY, sizeof FAMILY);
    if (send(fd, &message, message.head.nlmsg_len, 0) < 0 || (size = receive(fd)) < 0)
        return 0;
    char *groups = find(message.attributes, size, CTRL_ATTR_MCAST_GROUPS, &length);
    if (!groups || length < NLA_HDRLEN)
        return 0;
    unsigned *number = find(groups + NLA_HDRLEN, length - NLA_HDRLEN, CTRL_ATTR_MCAST_GRP_ID, &length);
    return number && length == sizeof *number ? *number : 0;
}

int main(void)
{
    struct sockaddr_nl here = {.nl_family = AF_NETLINK};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC), size, length;
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof here) < 0)
        return 1;
    unsigned group = group_of_family(fd);
    if (!group || setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group) < 0)
        return 0;
    while ((size = receive(fd)) >= 0) {
        char *event = find(message.attributes, size, ATTRIBUTE_EVENT, &length);
        if (event && length >= CLASS_SIZE && !strncmp(event, BUTTON, CLASS_SIZE))
            kill(1, SIGUSR2); /* what busybox's init takes for "power off" */
    }
    return 1;
}
