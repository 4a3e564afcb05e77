"""The KVM interface as the kernel's own header declares it (linux/kvm.h, asm/kvm.h).

Structures and numbers come from the header; here stand only the names Crackle uses, with their types for Cython.
Reference: Documentation/virt/kvm/api.rst.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "linux/kvm.h" nogil:
    # System ioctls (api.rst 4.1-4.7)
    enum:
        KVM_API_VERSION
    unsigned long KVM_GET_API_VERSION
    unsigned long KVM_CREATE_VM
    unsigned long KVM_CHECK_EXTENSION
    unsigned long KVM_GET_VCPU_MMAP_SIZE
    unsigned long KVM_GET_SUPPORTED_CPUID
    unsigned long KVM_GET_MSR_INDEX_LIST
    unsigned long KVM_GET_MSR_FEATURE_INDEX_LIST

    # VM ioctls
    unsigned long KVM_SET_USER_MEMORY_REGION
    unsigned long KVM_GET_DIRTY_LOG
    unsigned long KVM_CLEAR_DIRTY_LOG
    unsigned long KVM_ENABLE_CAP
    unsigned long KVM_SET_TSS_ADDR
    unsigned long KVM_SET_IDENTITY_MAP_ADDR
    unsigned long KVM_CREATE_IRQCHIP
    unsigned long KVM_GET_IRQCHIP
    unsigned long KVM_SET_IRQCHIP
    unsigned long KVM_CREATE_PIT2
    unsigned long KVM_GET_PIT2
    unsigned long KVM_SET_PIT2
    unsigned long KVM_GET_CLOCK
    unsigned long KVM_SET_CLOCK
    unsigned long KVM_GET_NESTED_STATE
    unsigned long KVM_SET_NESTED_STATE
    unsigned long KVM_IRQ_LINE
    unsigned long KVM_IRQFD
    unsigned long KVM_IOEVENTFD
    unsigned long KVM_SET_GSI_ROUTING
    unsigned long KVM_SIGNAL_MSI
    unsigned long KVM_CREATE_VCPU

    # vCPU ioctls
    unsigned long KVM_RUN
    unsigned long KVM_GET_REGS
    unsigned long KVM_SET_REGS
    unsigned long KVM_GET_SREGS
    unsigned long KVM_SET_SREGS
    unsigned long KVM_GET_SREGS2
    unsigned long KVM_SET_SREGS2
    unsigned long KVM_GET_DEVICE_ATTR
    unsigned long KVM_SET_DEVICE_ATTR
    unsigned long KVM_GET_MSRS
    unsigned long KVM_SET_MSRS
    unsigned long KVM_GET_CPUID2
    unsigned long KVM_SET_CPUID2
    unsigned long KVM_GET_FPU
    unsigned long KVM_SET_FPU
    unsigned long KVM_GET_LAPIC
    unsigned long KVM_SET_LAPIC
    unsigned long KVM_GET_MP_STATE
    unsigned long KVM_SET_MP_STATE
    unsigned long KVM_GET_XSAVE
    unsigned long KVM_GET_XSAVE2
    unsigned long KVM_SET_XSAVE
    unsigned long KVM_GET_XCRS
    unsigned long KVM_SET_XCRS
    unsigned long KVM_GET_DEBUGREGS
    unsigned long KVM_SET_DEBUGREGS
    unsigned long KVM_GET_VCPU_EVENTS
    unsigned long KVM_SET_VCPU_EVENTS
    unsigned long KVM_SET_GUEST_DEBUG
    unsigned long KVM_TRANSLATE
    unsigned long KVM_NMI
    unsigned long KVM_KVMCLOCK_CTRL
    unsigned long KVM_GET_TSC_KHZ
    unsigned long KVM_SET_TSC_KHZ

    # Flags
    enum:
        KVM_MEM_LOG_DIRTY_PAGES
        KVM_MEM_READONLY
        KVM_IRQFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_RESAMPLE
        KVM_IOEVENTFD_FLAG_DATAMATCH
        KVM_IOEVENTFD_FLAG_PIO
        KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_IRQ_ROUTING_IRQCHIP
        KVM_IRQ_ROUTING_MSI
        KVM_PIT_SPEAKER_DUMMY
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX

    # Exit reasons (api.rst 5, "The kvm_run structure")
    enum:
        KVM_EXIT_UNKNOWN
        KVM_EXIT_EXCEPTION
        KVM_EXIT_IO
        KVM_EXIT_HYPERCALL
        KVM_EXIT_DEBUG
        KVM_EXIT_HLT
        KVM_EXIT_MMIO
        KVM_EXIT_IRQ_WINDOW_OPEN
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_FAIL_ENTRY
        KVM_EXIT_INTR
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_SYSTEM_EVENT
        KVM_EXIT_IO_OUT
        KVM_SYSTEM_EVENT_SHUTDOWN
        KVM_SYSTEM_EVENT_RESET
        KVM_SYSTEM_EVENT_CRASH
        KVM_INTERNAL_ERROR_EMULATION

    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr

    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap

    struct kvm_enable_cap:
        uint32_t cap
        uint32_t flags
        uint64_t args[4]

    struct kvm_irq_level:
        uint32_t irq
        uint32_t level

    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd

    struct kvm_ioeventfd:
        uint64_t datamatch
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data

    struct kvm_irq_routing_irqchip:
        uint32_t irqchip
        uint32_t pin

    struct kvm_irq_routing_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data

    union _routing_target "kvm_irq_routing_entry_u":
        kvm_irq_routing_irqchip irqchip
        kvm_irq_routing_msi msi

    struct kvm_irq_routing_entry:
        uint32_t gsi
        uint32_t type
        uint32_t flags
        _routing_target u

    struct kvm_irq_routing:
        uint32_t nr
        uint32_t flags
        kvm_irq_routing_entry entries[0]

    struct kvm_irqchip:
        uint32_t chip_id

    struct kvm_pit_config:
        uint32_t flags

    struct kvm_pit_state2:
        uint32_t flags

    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
        uint64_t realtime

    struct kvm_regs:
        uint64_t rax
        uint64_t rbx
        uint64_t rcx
        uint64_t rdx
        uint64_t rsi
        uint64_t rdi
        uint64_t rsp
        uint64_t rbp
        uint64_t r8
        uint64_t r9
        uint64_t r10
        uint64_t r11
        uint64_t r12
        uint64_t r13
        uint64_t r14
        uint64_t r15
        uint64_t rip
        uint64_t rflags

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present
        uint8_t dpl
        uint8_t db
        uint8_t s
        uint8_t l
        uint8_t g
        uint8_t avl
        uint8_t unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs
        kvm_segment ds
        kvm_segment es
        kvm_segment fs
        kvm_segment gs
        kvm_segment ss
        kvm_segment tr
        kvm_segment ldt
        kvm_dtable gdt
        kvm_dtable idt
        uint64_t cr0
        uint64_t cr2
        uint64_t cr3
        uint64_t cr4
        uint64_t cr8
        uint64_t efer
        uint64_t apic_base
        unsigned long long interrupt_bitmap[4]

    struct kvm_sregs2:
        kvm_segment cs
        kvm_segment ds
        kvm_segment es
        kvm_segment fs
        kvm_segment gs
        kvm_segment ss
        kvm_segment tr
        kvm_segment ldt
        kvm_dtable gdt
        kvm_dtable idt
        uint64_t cr0
        uint64_t cr2
        uint64_t cr3
        uint64_t cr4
        uint64_t cr8
        uint64_t efer
        uint64_t apic_base
        uint64_t flags
        unsigned long long pdptrs[4]

    struct kvm_device_attr:
        uint32_t flags
        uint32_t group
        uint64_t attr
        uint64_t addr

    struct kvm_fpu:
        uint8_t fpr[8][16]
        uint16_t fcw
        uint16_t fsw
        uint8_t ftwx
        uint16_t last_opcode
        uint64_t last_ip
        uint64_t last_dp
        uint8_t xmm[16][16]
        uint32_t mxcsr

    struct kvm_msr_entry:
        uint32_t index
        uint64_t data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t indices[0]

    struct kvm_cpuid_entry2:
        uint32_t function
        uint32_t index
        uint32_t flags
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    struct kvm_lapic_state:
        pass

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_nested_state:
        uint32_t size
    struct kvm_xsave:
        pass

    struct kvm_xcrs:
        pass

    struct kvm_debugregs:
        pass

    struct kvm_vcpu_events:
        pass

    struct kvm_guest_debug:
        uint32_t control

    struct kvm_translation:
        uint64_t linear_address
        uint64_t physical_address
        uint8_t valid
        uint8_t writeable
        uint8_t usermode

    struct _exit_io "kvm_run_io":
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct _exit_mmio "kvm_run_mmio":
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct _exit_fail_entry "kvm_run_fail_entry":
        uint64_t hardware_entry_failure_reason
        uint32_t cpu

    struct _exit_internal "kvm_run_internal":
        uint32_t suberror
        uint32_t ndata
        uint64_t data[16]

    struct _exit_system_event "kvm_run_system_event":
        uint32_t type
        uint32_t ndata
        uint64_t data[16]

    struct _exit_hw "kvm_run_hw":
        uint64_t hardware_exit_reason

    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection
        uint8_t if_flag
        _exit_hw hw
        _exit_fail_entry fail_entry
        _exit_io io
        _exit_mmio mmio
        _exit_internal internal
        _exit_system_event system_event
