from crackle.includes.kvm cimport kvm_cpuid2

# The entries of a CPUID table as a list of CpuidEntry.
cdef list cpuid_list(kvm_cpuid2 *table)
